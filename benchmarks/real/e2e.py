"""E2E: turn facts about a restaurant into a sentence, with a 260k-parameter Llama pretrained only on TinyStories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.real.study import Row, Study, need
from lightning_peft.data import GenerationData
from lightning_peft.tasks import LanguageModel

PROMPT = "{prompt} ||"
PREFIX = {"num_virtual_tokens": 20}


def prompt(tokens: int) -> dict[str, Any]:
    """Virtual tokens after BOS, which was always first in pretraining; the second table compares both positions."""
    return {"num_virtual_tokens": tokens, "position": "after_bos"}


class E2E(Study):
    name = "e2e"
    title = "stories260K on E2E: data to text"
    task = (
        "The pretrained model is a Llama of 260,032 parameters that writes children's stories; the task is to put a "
        "restaurant's attributes into a sentence. Training uses the E2E validation file (4,672 pairs), the test "
        "every "
        "12th pair of the test file (392), half of whose 18 restaurants are new. `loss` is the cross entropy in nats "
        "per token of the reference text given the attributes, end of text included; `stories` is the loss on "
        "TinyStories with the adapter active: it shows how much was forgotten (an adapter can be switched off, but "
        "changes of the base cannot). `slots %` is the share of attribute values, except `family friendly`, that "
        "the "
        "greedy text repeats word by word, over 52 sets of attributes; the people who wrote the references repeat 87 %."
    )
    metrics = {"loss": "{:.3f}", "slots %": "{:.1f}", "stories": "{:.3f}"}
    higher_is_better = False
    steps = 300
    batch_size = 8
    prompts = (
        "name : Blue Spice | Type : coffee shop | area : city centre",
        "name : The Mill | Type : pub | food : Italian | price : cheap | area : riverside | near : Raja Indian Cuisine",
    )
    search_steps = 60
    rows = (
        Row("base"),
        Row("norm tuning", "NormTuning", {}, 1e-1),
        Row("prompt tuning, 20 tokens", "PromptTuning", prompt(20), 1e-1),
        Row("P-tuning, 20 tokens", "PTuning", prompt(20), 3e-2),
        Row("prefix tuning, 20 tokens", "PrefixTuning", PREFIX, 1e-1),
        Row("IA3", "IA3", {}, 1e-1),
        Row("SSF", "SSF", {}, 3e-2),
        Row("bottleneck of 8, serial", "BottleneckAdapter", {"bottleneck_size": 8}, 3e-2),
        Row("LoRA r=2", "LoRA", {"r": 2, "alpha": 4}, lr_of="LoRA r=8"),
        Row("LoRA r=8", "LoRA", {"r": 8, "alpha": 16}, 1e-2),
        Row("DoRA r=8", "DoRA", {"r": 8, "alpha": 16}, lr_of="LoRA r=8"),
        Row("last block", "LastLayers", {}, 1e-2),
        Row("full fine-tuning", "FullFineTuning", {}, 3e-3),
        Row("prompt before BOS", "PromptTuning", {"num_virtual_tokens": 20}, 1e-1, probe=True),
        Row("prompt of 5 tokens", "PromptTuning", prompt(5), 1e-1, probe=True),
        Row("prompt of 80 tokens", "PromptTuning", prompt(80), 1e-1, probe=True),
        Row("prefix of 5 tokens", "PrefixTuning", {"num_virtual_tokens": 5}, 1e-1, probe=True),
        Row("prefix of 80 tokens", "PrefixTuning", {"num_virtual_tokens": 80}, 1e-1, probe=True),
        Row("prefix from deviation 1", "PrefixTuning", {**PREFIX, "init_std": 1.0}, 1e-1, probe=True),
        Row("prefix through a network", "PrefixTuning", {**PREFIX, "bottleneck_size": 64}, 1e-2, probe=True),
    )

    def prepare(self, folder: Path, tuning: bool) -> None:
        self.model = str(need("stories260K"))
        train = need("e2e/valid.txt").read_text().splitlines()
        test = need("e2e/test.txt").read_text().splitlines()[::12]
        if tuning:  # split by meaning, so that no attributes of the test are in training
            meanings = list(dict.fromkeys(line.partition("||")[0] for line in train))
            held = set(meanings[::10])
            test = [line for line in train if line.partition("||")[0] in held][::2]
            train = [line for line in train if line.partition("||")[0] not in held]
        self.tuning = tuning
        self.asked = list(dict.fromkeys(line.partition("||")[0] for line in test))[::7]
        self.train, self.test = folder / "train.txt", folder / "test.txt"
        self.train.write_text("\n".join(train))
        self.test.write_text("\n".join(test))
        self.stories = need("tinystories/tiny_stories.txt").read_text()[:120_000]

    def module(self, lr: float) -> LanguageModel:
        return LanguageModel(self.model, lr=lr)

    def data(self) -> GenerationData:
        return GenerationData(
            str(self.train),
            test=str(self.test),
            prompt="text",
            separator="||",
            template=PROMPT,
            batch_size=self.batch_size,
        )

    def scores(self, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
        assert isinstance(module, LanguageModel)
        assert isinstance(data, GenerationData)
        loss = trainer.test(module, data, verbose=False)[0]["test/loss"]
        if self.tuning:
            return {"loss": loss}
        texts = _write(module, self.asked, 100)
        slots = sum(map(named, self.asked, texts)) / len(texts)
        return {"loss": loss, "slots %": 100 * slots, "stories": _story_loss(module, data, self.stories)}

    def samples(self, module: L.LightningModule) -> list[str]:
        assert isinstance(module, LanguageModel)
        return _write(module, self.prompts, 80)


def named(meaning: str, text: str) -> float:
    """The share of the attributes' values that the text repeats, without "family friendly", which is yes or no."""
    pairs = [part.partition(" : ")[::2] for part in meaning.lower().split("|")]
    values = [" ".join(value.split()) for key, value in pairs if key.strip() != "family friendly"]
    said = " ".join(text.lower().split())
    return sum(value in said for value in values) / len(values)


def _write(module: LanguageModel, meanings: Sequence[str], tokens: int) -> list[str]:
    """Greedy texts of at most ``tokens`` tokens, with repeated spaces removed."""
    prompts = [PROMPT.replace("{prompt}", meaning) for meaning in meanings]
    return [" ".join(text.split()) for text in module.generate(prompts, max_new_tokens=tokens)]


@torch.no_grad()
def _story_loss(module: LanguageModel, data: GenerationData, text: str, length: int = 256) -> float:
    """The loss in nats per token of a long text, cut into blocks that each begin with BOS."""
    ids = torch.tensor(data.tokenizer(text, add_special_tokens=False)["input_ids"])
    blocks = ids[: len(ids) // length * length].view(-1, length)
    begin = torch.full((len(blocks), 1), data.tokenizer.bos_token_id)
    module.eval()
    losses = [_loss(module, part) for part in torch.cat([begin, blocks], 1).split(16)]
    return float(torch.cat(losses).mean())


def _loss(module: LanguageModel, ids: Tensor) -> Tensor:
    logits = module(ids, torch.ones_like(ids))[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


STUDY = E2E()
