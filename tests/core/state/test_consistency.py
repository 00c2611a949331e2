"""Test that a model that was changed after methods were applied is detected."""

from __future__ import annotations

import copy
import warnings

import lightning as L
import peft
import pytest
import torch
import transformers
from torch import nn

import lightning_peft as lp
from lightning_peft.core.state.consistency import update_base
from tests.formats.models import llama, tokens
from tests.helpers import adapter_parameters, assert_same_bits, bits, close, perturb
from tests.models import MLP, ResNet
from tests.trainer.toys import Toy, trainer

RESIZED = {
    "replaced": ("lm_head", r"'lm_head' was replaced and no longer carries it"),
    "resized in place": ("embed_tokens", r"'model.embed_tokens' was resized from 64x32 to 72x32"),
}


def resized(target: str) -> nn.Module:
    model = llama()
    lp.apply(model, lp.LoRA(r=2, targets=[target, "q_proj"]))
    model.resize_token_embeddings(72, mean_resizing=False)
    return model


@pytest.mark.parametrize("case", RESIZED)
def test_a_module_that_was_replaced_or_resized_is_named_wherever_record_and_model_meet(case: str, tmp_path):
    target, message = RESIZED[case]
    lp.apply(other := llama(), lp.LoRA(r=2, name="other"))
    lp.save_adapter(other, tmp_path / "other")
    model = resized(target)
    before = bits(model)
    attempts = {
        "apply": lambda: lp.apply(model, lp.LoRA(r=2, targets=[target, "q_proj"])),
        "save": lambda: lp.save_adapter(model, tmp_path / "saved"),
        "load": lambda: lp.load_adapter(model, tmp_path / "other"),
        "merge": lambda: lp.merge(model),
    }
    for attempt in attempts.values():
        with pytest.raises((lp.StateError, lp.MergeError), match=message):
            attempt()
    assert_same_bits(bits(model), before)
    lp.unload(model)
    lp.apply(model, lp.LoRA(r=2, targets=[target, "q_proj"]))
    lp.save_adapter(model, tmp_path / "saved")


def test_copies_and_deleted_adapters_are_part_of_the_record(tmp_path):
    model = MLP()
    lp.apply(source := copy.deepcopy(model), lp.LoRA(r=2, trainable="head"))
    lp.save_adapter(source, tmp_path)
    lp.load_adapter(model, tmp_path, name="a")
    lp.load_adapter(model, tmp_path, name="b")
    model.head = nn.Linear(8, 3)
    with pytest.raises(lp.StateError, match=r"adapter 'a': 'head' was replaced .*adapter 'b': 'head' was replaced"):
        lp.save_adapter(model, tmp_path / "again")
    for name in ("a", "b"):
        lp.delete_adapter(model, name)
    lp.apply(model, lp.LoRA(r=2))


def test_fit_and_checkpoints_detect_replaced_modules(tmp_path):
    module, method = Toy(), lp.LoRA(r=2, targets="body.4")
    trainer(tmp_path, method=method, max_steps=1).fit(module)
    module.body[4] = nn.Linear(16, 16)
    with pytest.raises(lp.StateError, match=r"'body\.4' was replaced"):
        trainer(tmp_path, method=method, max_steps=1).fit(module)

    class Replaces(L.Callback):
        def on_train_start(self, trainer, module):
            module.body[4] = nn.Linear(16, 16)

    run = trainer(tmp_path, Replaces(), method=lp.LoRA(r=2, targets=["body.4", "body.0"]), max_steps=1)
    with pytest.raises(lp.StateError, match=r"'body\.4' was replaced"):
        run.fit(Toy())


def test_adapters_keep_their_values_through_to_empty():
    with torch.device("meta"):
        model = MLP()
    for method in (lp.LoRA(r=2), lp.VeRA(r=2, name="vera"), lp.LoHa(r=2, name="loha")):
        lp.apply(model, method)
    before = {k: v.clone() for k, v in adapter_parameters(perturb(model)).items()}
    model.half().to_empty(device="cpu")
    assert_same_bits(adapter_parameters(model), before)
    model.load_state_dict({k: v.half() for k, v in MLP().state_dict().items()}, strict=False)
    assert not any(t.is_meta for t in model.state_dict().values())


def test_a_base_whose_values_came_later_is_the_one_that_an_adapter_belongs_to(tmp_path):
    with torch.device("meta"):
        model = ResNet()
    lp.apply(model, lp.LoRA(r=2, targets="stem", train_norm_stats=True))
    base = ResNet()
    model.load_state_dict(base.state_dict(), strict=False, assign=True)
    lp.save_adapter(perturb(model), tmp_path)
    assert not [k for k in lp.adapter_state(model) if "running" in k]
    torch.manual_seed(2)
    with pytest.raises(lp.StateError, match="different base"):
        lp.load_adapter(ResNet(), tmp_path)
    same = ResNet()
    same.load_state_dict(base.state_dict())
    lp.load_adapter(same, tmp_path)
    x = torch.randn(2, 3, 5, 5)
    close(same.eval()(x), model.eval()(x))


def test_buffers_that_training_moved_stay_so_where_nothing_is_frozen():
    model = ResNet()
    lp.apply(model, lp.FullFineTuning())
    model.train()(torch.randn(4, 3, 5, 5))
    update_base(model)
    assert any("running_mean" in key for key in lp.adapter_state(model))


def test_methods_are_not_put_around_peft():
    config, prompt = peft.LoraConfig(target_modules=["q_proj"]), peft.PromptTuningConfig(num_virtual_tokens=2)
    prompt.task_type = "CAUSAL_LM"
    wrapped = peft.get_peft_model(llama(), config)
    for model in (wrapped, wrapped.get_base_model(), peft.get_peft_model(llama(), prompt)):
        before = [type(m) for m in model.modules()]
        with pytest.raises(lp.InjectionError, match=r"is a module of PEFT .*merge_and_unload"):
            lp.apply(model, lp.LoRA(r=2))
        assert [type(m) for m in model.modules()] == before
    lp.apply(wrapped.merge_and_unload(), lp.LoRA(r=2))


def test_save_pretrained_of_an_adapted_model_says_what_it_leaves_out(tmp_path):
    model, ids = llama(), tokens()
    lp.apply(model, lp.LoRA(r=2))
    perturb(model).eval()
    with pytest.warns(UserWarning, match=r"save_pretrained writes the base without its adapters \['default'\]"):
        model.save_pretrained(tmp_path / "base")
    output = model(ids).logits
    lp.unload(model, merge=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "merged")
    assert type(model) is transformers.LlamaForCausalLM
    close(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits, output)
