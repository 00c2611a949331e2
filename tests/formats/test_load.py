"""The checks of loading, and that a failed load leaves the model unchanged."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_peft as lp
from tests.formats.models import adapted, bert, llama, logits, made_by_peft, tokens


@pytest.fixture
def saved(tmp_path):
    base = llama()
    lp.save_adapter(adapted(base, lp.LoRA(r=2, targets=["q_proj", "v_proj"])), tmp_path)
    return base, tmp_path


def edit_config(directory, **options):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def edit_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(Q), r"no tensor '.*layers.0.self_attn.q_proj.lora_A.weight'; nearest"),
        (lambda t: t.update({Q.replace("q_proj", "qq_proj"): t[Q].clone()}), "does not mention: .*qq_proj"),
        (
            lambda t: t.update({Q: t[Q][:, :-1].clone()}),
            r"q_proj.lora_A.weight' has shape 2x31, but this base needs 2x32",
        ),
        (lambda t: t.update({Q: torch.zeros(0, 32)}), "q_proj.*0x32, but this base needs 2x32"),
        (lambda t: t.update({Q: t[Q] * float("nan")}), "q_proj.*NaN"),
    ],
)
def test_wrong_tensors_are_named_and_nothing_is_changed(saved, change, said):
    base, directory = saved
    edit_tensors(directory, change)
    unchanged(base, directory, said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_qalora": True}, "use_qalora=True"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"a_new_option": 3}, "unknown option a_new_option=3"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"target_modules": ["qproj"]}, "target_modules: 'qproj' matches nothing; nearest: .*q_proj"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"modules_to_save": ["lm_hed"]}, "modules_to_save: 'lm_hed' matches nothing; nearest: lm_head"),
        ({"peft_type": "LORAA"}, "peft_type 'LORAA' is not supported; supported are"),
        ({"peft_type": "TRAINABLE_TOKENS"}, "trains single embedding vectors only together with LoRA"),
        ({"r": "two"}, "r must be a number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank of .*q_proj"),
        ({"bias": "some"}, "bias must be"),
        ({"target_modules": "(q_proj"}, "is not a valid regular expression"),
        ({"target_modules": "(" * 9999 + ")" * 9999}, "is not a valid regular expression"),
        ({"modules_to_save": ["lm_head("]}, r"modules_to_save: 'lm_head\(' is not a valid regular expression"),
        ({"target_modules": 5}, "must be a list of names, got 5"),
        ({"rank_pattern": [1]}, "rank_pattern must map patterns to numbers"),
        ({"lora_dropout": 2.0}, "dropout must be a probability"),
    ],
)
def test_options_that_change_the_output_are_refused(saved, options, said):
    base, directory = saved
    edit_config(directory, **options)
    unchanged(base, directory, said)


def unchanged(base, directory, said, error=lp.FormatError, **options):
    model, x = copy.deepcopy(base), tokens()
    kinds = [type(m) for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=said):
        lp.load_adapter(model, directory, **options)
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == grads
    assert model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(model, x), logits(base, x), rtol=0, atol=0)


def test_another_base_is_an_error_unless_allowed(saved):
    _, directory = saved
    other = llama()
    unchanged(other, directory, "different base", error=lp.StateError)
    lp.load_adapter(other, directory, check_base=False)


@pytest.mark.parametrize("facts", ["[1]", "{", '{"fingerprint": 3}', '{"fingerprint": {"values": 3}}'])
def test_facts_that_were_tampered_with(saved, facts):
    base, directory = saved
    path = directory / "adapter_model.safetensors"
    save_file(load_file(path), path, {"lightning_peft": facts})
    unchanged(base, directory, "lightning_peft|cannot have")


def test_the_base_in_another_precision_is_the_same(saved):
    base, directory = saved
    lp.load_adapter(copy.deepcopy(base).bfloat16(), directory)


def test_a_name_that_is_taken(saved):
    base, directory = saved
    model = adapted(base, lp.LoRA(r=2, targets=["o_proj"]))
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        lp.load_adapter(model, directory)
    lp.load_adapter(model, directory, name="second")


def test_several_adapters_in_folders_of_their_names(tmp_path):
    base, x = llama(), tokens()
    model = adapted(base, lp.LoRA(r=2, targets=["q_proj"], name="a"), lp.LoRA(r=2, targets=["v_proj"], name="b"))
    lp.save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    again = copy.deepcopy(base)
    assert lp.load_adapter(again, tmp_path) == ["a", "b"]
    torch.testing.assert_close(logits(again, x), logits(model, x))
    edit_config(tmp_path / "b", use_qalora=True)
    unchanged(base, tmp_path, "use_qalora")
    lp.save_adapter(model, tmp_path / "one", name="b")
    assert (tmp_path / "one" / "adapter_config.json").exists()


def test_each_task_keeps_its_own_head(tmp_path):
    base, x, expected = bert(), tokens(), {}
    for task, method in {"a": lp.LoRA(r=2, trainable=["classifier"]), "b": lp.BitFit(trainable=["classifier"])}.items():
        model = adapted(base, method)
        lp.save_adapter(model, tmp_path / task)
        expected[task] = logits(model, x)
    wide = bert(num_labels=5)
    wide.load_state_dict({k: v for k, v in base.state_dict().items() if "classifier" not in k}, strict=False)
    lp.save_adapter(wide := adapted(wide, lp.LoRA(r=2, trainable=["classifier"])), tmp_path / "c")
    expected["c"] = logits(wide, x)

    model = copy.deepcopy(base)
    for task in "abc":
        lp.load_adapter(model, tmp_path / task, name=task)
    for task in "abc":
        with lp.active(model, task):
            torch.testing.assert_close(logits(model, x), expected[task])
    with lp.disabled(model):
        torch.testing.assert_close(logits(model, x), logits(base, x))
    with lp.rows(model, ["b", "a"]):
        rows = logits(model, x)
    torch.testing.assert_close(rows, torch.stack([expected["b"][0], expected["a"][1]]))


def test_a_trainable_adapter_continues_training_and_is_saved_again(saved, tmp_path):
    base, directory = saved
    model, x = copy.deepcopy(base), tokens()
    lp.load_adapter(model, directory, trainable=True)
    optimizer = torch.optim.SGD(lp.trainable_parameters(model), lr=1.0)
    model(x).logits.square().mean().backward()
    optimizer.step()
    lp.save_adapter(model, tmp_path / "more")
    again = copy.deepcopy(base)
    lp.load_adapter(again, tmp_path / "more")
    torch.testing.assert_close(logits(again, x), logits(model, x))
    assert not lp.trainable_parameters(again)


def test_a_loaded_adapter_merges_and_unloads(saved):
    base, directory = saved
    model, x = copy.deepcopy(base), tokens()
    lp.load_adapter(model, directory)
    want = logits(model, x)
    lp.merge(model)
    torch.testing.assert_close(logits(model, x), want, rtol=1e-4, atol=1e-5)
    lp.unload(model)
    torch.testing.assert_close(logits(model, x), logits(base, x), rtol=0, atol=0)
    assert {type(m) for m in model.modules()} == {type(m) for m in base.modules()}


@pytest.mark.parametrize(
    "where",
    [
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*layers\.0\..*(q|k)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*0\.self_attn\.o_proj"},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {r"layers\.1.*k_proj": 6, "q_proj": 5}},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"},
        {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora"},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    ],
)
def test_targets_and_options_mean_what_they_mean_in_peft(where, tmp_path):
    base, x = llama(), tokens()
    made_by_peft(base, peft.LoraConfig(r=4, lora_alpha=3, **where), tmp_path)
    if "rank_pattern" not in where and not isinstance(where["target_modules"], list):
        edit_config(tmp_path, target_modules=where["target_modules"])  # PEFT writes the names of the modules it found
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ours = copy.deepcopy(base)
    lp.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours, x), logits(theirs, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(ours, x), logits(base, x), atol=1e-3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_modules", r"([a-z_.0-9]+)+!"),
        ("rank_pattern", {r"(\w|\w)*(\w|\.)*(a|\D)*!": 2}),
        ("modules_to_save", [r"(?:.?){30}!"]),
    ],
)
def test_a_pattern_that_would_never_end(saved, monkeypatch, option, value):
    base, directory = saved
    monkeypatch.setattr("lightning_peft.core.untrusted.LIMIT", 0.5)
    edit_config(directory, **{option: value})
    unchanged(base, directory, "the regular expression .*! takes more than 0.5 seconds".replace("!", ".*"))


def test_an_adapter_for_another_model_class_names_both(saved):
    _, directory = saved
    with pytest.raises(lp.StateError, match=r"made for 'LlamaForCausalLM', onto BertFor.*check_base=False"):
        lp.load_adapter(bert(), directory)
    with pytest.raises(lp.FormatError, match=r"onto BertForSeq.*q_proj' matches nothing; nearest: .*self.query"):
        lp.load_adapter(bert(), directory, check_base=False)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("runs/summarys", "there is no directory runs/summarys; near it: summaries"),
        ("org/name", r"snapshot_download\('org/name'\)"),
        ("runs/whole", "holds a whole model .*from_pretrained"),
        ("runs/run.ckpt", "is a file.*lightning-peft export runs/run.ckpt"),
        ("runs/empty", "has no adapter_config.json.*it is empty"),
    ],
)
def test_a_wrong_path_suggests_the_right_one(where, said):
    for folder in ("summaries", "whole", "empty"):
        (Path("runs") / folder).mkdir(parents=True)
    Path("runs/whole/config.json").write_text("{}")
    Path("runs/run.ckpt").write_text("")
    with pytest.raises(lp.FormatError, match=said):
        lp.load_adapter(bert(), where)
