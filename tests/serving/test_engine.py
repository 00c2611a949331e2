"""Requests for different adapters share a batch, and each gets the same answer as with its adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.data import TextClassificationData
from lightning_peft.pretrained import load_tokenizer
from lightning_peft.serving.engine import Engine, Event, GenerateJob, PredictJob
from lightning_peft.serving.generator import Generator
from lightning_peft.serving.pool import AdapterFolder, AdapterPool
from lightning_peft.serving.predictor import DataInputs, Predictor
from lightning_peft.serving.rows_context import RowsContext
from lightning_peft.serving.sequence import Sampling
from lightning_peft.tasks import LanguageModel, TextClassifier
from tests.serving.modules import Regressor, save_adapters

METHODS = {
    "lora": lp.LoRA(r=2, targets="all-linear", exclude=()),
    "dora": lp.DoRA(r=2, targets="all-linear", exclude=()),
    "bias": lp.BitFit(),
}


class Tokens(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 2)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.embed(batch).sum(1)


def engine_of(module: Any, folder: Path, texts: Any = None, data: Any = None, rows: int = 8) -> Engine:
    module.eval()
    context = RowsContext(module)
    pool = AdapterPool(module, AdapterFolder(folder), before_change=context.close)
    if texts is not None:
        return Engine(pool, None, Generator(module.model, context, texts), rows)
    return Engine(pool, Predictor(module, context, None if data is None else DataInputs(module, data)), None, rows)


def run(engine: Engine, jobs: dict[Any, PredictJob | GenerateJob]) -> list[Event]:
    events = [event for uid, job in jobs.items() for event in engine.submit(uid, job)]
    while engine:
        events += engine.step()
    return events


class TestPredictions:
    def test_each_request_gets_the_answer_of_its_adapter(self, tmp_path: Path):
        models = {**save_adapters(tmp_path, METHODS), None: Regressor()}
        x = torch.randn(5, 4)
        jobs = {(name, i): PredictJob(name, x[i : i + 2].tolist(), 0) for i in range(4) for name in models}
        engine = engine_of(Regressor(), tmp_path)
        sizes, events = [], [e for uid, job in jobs.items() for e in engine.submit(uid, job)]
        while engine:
            events += engine.step()
            sizes.append(engine.batch_size)
        assert max(sizes) == 8  # requests share batches, and fill them
        assert len(events) == len(jobs)
        for event in events:
            name, i = event.uid
            want = models[name].eval().predict_step(x[i : i + 2], 0)
            torch.testing.assert_close(torch.tensor(event.content["predictions"]), want.detach())

    def test_a_request_that_fails_does_not_fail_the_others(self, tmp_path: Path):
        save_adapters(tmp_path, METHODS)
        engine = engine_of(Regressor(), tmp_path)
        good, wrong, words = [[0.0] * 4], [[0.0] * 3], ["a"]
        jobs = {"good": good, "wrong": wrong, "words": words, "again": good}
        events = {e.uid: e for e in run(engine, {uid: PredictJob("lora", x, 0) for uid, x in jobs.items()})}
        assert events["good"].content == events["again"].content
        assert events["wrong"].error.status == 500
        assert events["words"].error.status == 422
        assert not any(loaded.users for loaded in engine.pool._current.values())

    @pytest.mark.parametrize("token", [-1, 8, 10**6])
    def test_a_number_that_the_embedding_has_no_row_for_is_refused(self, token: int, tmp_path: Path):
        engine = engine_of(Tokens(), tmp_path)
        jobs = {"good": PredictJob(None, [[1, 7]], 0), "bad": PredictJob(None, [[1, token]], 0)}
        events = {event.uid: event for event in run(engine, jobs)}
        assert events["good"].error is None
        assert events["bad"].error.status == 422
        assert f"{token} is out of range: expected 0 to 7" in events["bad"].error.message

    def test_texts_go_in_and_label_names_come_out(self, tmp_path: Path):
        save_adapters(tmp_path, {"lora": lp.LoRA(r=2)}, lambda: TextClassifier("demo"))
        data = TextClassificationData("demo")
        data.tokenizer = load_tokenizer("demo")
        module = TextClassifier("demo")
        jobs = {name: PredictJob(name, ["list comprehension", "open a file"], 0) for name in ("lora", None)}
        events = {e.uid: e.content["predictions"] for e in run(engine_of(module, tmp_path, data=data), jobs)}
        assert [set(row) for row in events[None]] == [{"label", "probability"}] * 2
        assert {row["label"] for row in events[None]} <= set(module.names())
        assert events["lora"] != events[None]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: Any) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer("demo")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.3, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class TestTexts:
    METHODS = {
        "lora": lp.LoRA(r=2),
        "prefix": lp.PrefixTuning(num_virtual_tokens=3),
        "prompt": lp.PromptTuning(num_virtual_tokens=3),
        "ia3": lp.IA3(),
    }
    PROMPTS = ["a list of numbers", "import"]

    def test_mixed_requests_continue_as_each_does_alone(self, language_model: str, tmp_path: Path):
        save_adapters(tmp_path, self.METHODS, lambda: LanguageModel(language_model))
        engine = engine_of(LanguageModel(language_model), tmp_path, load_tokenizer(language_model))
        names = [None, *self.METHODS]
        lengths = {name: 4 + 3 * i for i, name in enumerate(names)}  # texts leave the batch at different steps
        jobs = {(n, p): PredictJob(n, [p], lengths[n]) for p in self.PROMPTS for n in names}
        events = run(engine, jobs)
        assert len(events) == len(jobs)
        assert len({event.content["text"] for event in events}) > len(names)
        for name in names:
            alone = LanguageModel(language_model)
            if name is not None:
                lp.load_adapter(alone, tmp_path / name)
            for prompt in self.PROMPTS:
                want = alone.generate([prompt], max_new_tokens=lengths[name])[0]
                assert next(e for e in events if e.uid == (name, prompt)).content["text"] == want

    def test_streamed_parts_add_up_and_stop_strings_are_cut(self, language_model: str, tmp_path: Path):
        engine = engine_of(LanguageModel(language_model), tmp_path, load_tokenizer(language_model))
        whole = run(engine, {0: GenerateJob(None, ["import"], Sampling(12))})[0].content
        stream = run(engine, {0: GenerateJob(None, ["import"], Sampling(12), stream=True)})
        assert "".join(e.content["text"] for e in stream) == whole["text"]
        assert whole["finish_reason"] == stream[-1].content["finish_reason"] == "length"
        stop = whole["text"][4:7]
        cut = run(engine, {0: GenerateJob(None, ["import"], Sampling(12, stop=(stop,)), stream=True)})
        assert "".join(e.content["text"] for e in cut) == whole["text"].partition(stop)[0]
        assert cut[-1].content["finish_reason"] == "stop"

    def test_a_seed_gives_the_same_text_in_any_batch(self, language_model: str, tmp_path: Path):
        engine = engine_of(LanguageModel(language_model), tmp_path, load_tokenizer(language_model))
        sampled = GenerateJob(None, ["import"], Sampling(10, temperature=1.0, top_p=0.9, seed=3), count=2)
        alone = {e.content["index"]: e.content["text"] for e in run(engine, {0: sampled})}
        others = {i: GenerateJob(None, ["a list"], Sampling(10, temperature=2.0)) for i in (1, 2)}
        mixed = {e.content["index"]: e.content["text"] for e in run(engine, {0: sampled, **others}) if e.uid == 0}
        assert alone == mixed
        assert alone[0] != alone[1]

    def test_a_client_that_leaves_frees_its_place_and_its_adapter(self, language_model: str, tmp_path: Path):
        save_adapters(tmp_path, {"lora": lp.LoRA(r=2)}, lambda: LanguageModel(language_model))
        engine = engine_of(LanguageModel(language_model), tmp_path, load_tokenizer(language_model))
        engine.submit("leaves", GenerateJob("lora", ["import"], Sampling(50)))
        engine.submit("stays", GenerateJob(None, ["import"], Sampling(5)))
        engine.step()
        engine.cancel("leaves")
        assert [event.uid for event in run(engine, {})] == ["stays"]
        assert not any(loaded.users for loaded in engine.pool._current.values())

    def test_a_prompt_beyond_the_positions_is_refused(self, language_model: str, tmp_path: Path):
        engine = engine_of(LanguageModel(language_model), tmp_path, load_tokenizer(language_model))
        engine.generator.positions = 8
        event = run(engine, {0: GenerateJob(None, ["import"], Sampling(20))})[0]
        assert event.error.status == 400
        assert "8 positions" in event.error.message
