"""ChatData: which tokens are learned, and packing in which texts do not attend to one another."""

from __future__ import annotations

import lightning as L
import pytest
import torch

import lightning_peft as lp
from lightning_peft.data import ChatData, GenerationData, LanguageModelData
from lightning_peft.pretrained import InputError
from lightning_peft.tasks import LanguageModel
from tests.data.tables import POLITE, QUIET, RUDE, write


def chats(path: str = "chats.jsonl", **names: str) -> str:
    role, content = names.get("role", "role"), names.get("content", "content")
    rows = [
        {"messages": [{role: "user", content: ask}, {role: names.get("answers", "assistant"), content: answer}] * 2}
        for ask, answer in zip(RUDE, POLITE)
    ]
    return write(path, rows)


def chat(gpt2: str, source: str, **options) -> ChatData:
    data = ChatData(source, tokenizer=gpt2, **{"chat_template": "plain", "max_length": 64, **options})
    data.setup("fit")
    return data


def test_only_the_answers_are_learned(gpt2):
    sharegpt = chats("share.jsonl", role="from", content="value", answers="gpt")
    for data in (chat(gpt2, chats()), chat(gpt2, sharegpt, role="from", content="value")):
        example = data.prepared("train")[0]
        learned = [i for i, label in zip(example["input_ids"], example["labels"]) if label != -100]
        assert data.tokenizer.decode(learned).split() == [*POLITE[0].split(), *POLITE[0].split()]
        assert [label for label in example["labels"] if label != -100] == learned
        assert "user: open it now" in data.tokenizer.decode(example["input_ids"])


def test_a_template_of_the_users_own_ends_answers_and_prompts_predict(gpt2):
    template = (
        "{% for m in messages %}[CLS]{{ m.role }} {{ m.content }}[SEP]{% endfor %}"
        "{% if add_generation_prompt %}[CLS]assistant {% endif %}"
    )
    with open("template.jinja", "w") as file:
        file.write(template)
    data = chat(gpt2, chats(), chat_template="template.jinja", predict=chats("new.jsonl"))
    example = data.prepared("train")[0]
    learned = data.tokenizer.decode([label for label in example["labels"] if label != -100])
    assert learned.count("[SEP]") == 2
    prompt = data.tokenizer.decode(data.prepared("predict")[0]["input_ids"]).strip()
    assert prompt.endswith(("[CLS] assistant", "[CLS]assistant"))
    texts = L.Trainer(**QUIET).predict(LanguageModel(gpt2, max_new_tokens=3), data)
    assert [len(batch) for batch in texts] == [4]


def test_chats_that_cannot_be_used(gpt2):
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        chat(gpt2, chats(), chat_template=None)
    questions = write("questions.jsonl", [{"messages": [{"role": "user", "content": "why"}]}])
    with pytest.raises(InputError, match=r"row 0 of '.*' has no message of the assistant"):
        chat(gpt2, questions)
    with pytest.raises(InputError, match=r"row 0 of '.*' does not have a list of messages with 'from' and 'value'"):
        chat(gpt2, chats(), role="from", content="value")
    with pytest.raises(InputError, match=r"its first answer begins after \d+ tokens, beyond max_length=4"):
        chat(gpt2, chats(), max_length=4)


def data_of(kind: str, model: str, packing: bool):
    if kind == "chat":
        return ChatData(chats(), tokenizer=model, chat_template="plain", max_length=96, packing=packing, batch_size=4)
    pairs = write("pairs.csv", [{"prompt": a, "target": b} for a, b in zip(RUDE, POLITE)])
    if kind == "pairs":
        return GenerationData(pairs, tokenizer=model, max_length=24, packing=packing, batch_size=4)
    return LanguageModelData(pairs, text="target", tokenizer=model, max_length=20, packing=packing, batch_size=4)


@pytest.mark.parametrize("kind", ["chat", "pairs", "texts"])
def test_packed_texts_give_the_same_loss_and_gradients(kind, gpt2):
    results = []
    for packing in (False, True):
        torch.manual_seed(0)
        module = LanguageModel(gpt2).eval()
        data = data_of(kind, gpt2, packing)
        data.setup("fit")
        total, count = torch.zeros(()), 0
        for batch in data.train_dataloader():
            loss, _ = module.compute(batch)
            total, count = total + loss * module.weight(batch), count + module.weight(batch)
        (total / count).backward()
        results.append((len(data.prepared("train")), count, (total / count).item(), module.model.transformer.h[0]))
    (rows, tokens, loss, block), (packs, tokens_packed, loss_packed, block_packed) = results
    assert packs < rows
    assert tokens == tokens_packed
    assert loss_packed == pytest.approx(loss, rel=1e-5)
    for one, other in zip(block.parameters(), block_packed.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_a_network_that_ignores_the_packs_is_refused(gpt2, monkeypatch):
    module = LanguageModel(gpt2)
    plain = module.model.forward

    def blind(input_ids, position_ids=None, **rest):
        return plain(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **rest)

    monkeypatch.setattr(module.model, "forward", blind)
    with pytest.raises(InputError, match="lets packed texts attend to one another"):
        L.Trainer(max_steps=1, callbacks=[lp.LoRA(r=2)], **QUIET).fit(module, data_of("texts", gpt2, True))
