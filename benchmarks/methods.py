"""The rows of the comparison: every method in this library and, if PEFT has it, in PEFT, with the same configuration.

A row's functions take the case and the rank. Only :func:`wrapped` imports PEFT, so without PEFT only its variants are
skipped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import attrs
from torch import nn

import lightning_peft as lp
from benchmarks.cases import Case
from lightning_peft.cli.methods import exported
from lightning_peft.formats.registry import CONVERTERS

TRANSFORMERS = ("llama", "bert")
EVERY = (*TRANSFORMERS, "resnet")
TOKENS = 20  # number of virtual tokens of prompts and prefixes
NO_CACHE = {"bert": "needs an encoder that accepts past_key_values; BERT does not from transformers 5.24 on"}


@dataclass(frozen=True)
class Hooks:
    """Functions that a method needs in a training step.

    Attributes:
        begin: called before the forward.
        gradients: called between the backward and the optimizer's step.
        stepped: called after the optimizer's step, before the gradients are cleared.
    """

    begin: Callable[[], Any] = lambda: None
    gradients: Callable[[], Any] = lambda: None
    stepped: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        ours: returns the callback for a case and a rank.
        peft: returns the case's model wrapped in PEFT's adapter; None if PEFT does not have the method.
        what: the configuration, as the table describes it.
        on: the cases it runs on.
        lacks: the reason why PEFT has no variant on a case, by case.
        identity: whether the model starts as its base.
        entry: whether backward runs to the embeddings, as the floor's does. Otherwise it ends at the method's lowest
            parameter, which is an advantage of such a method.
        steps: returns the functions that our method needs in a step, given the method and the model.
        peft_steps: the same for PEFT's model.
        why: the reason, if this library is slower (``"time"``) or saves more (``"saved"``) than PEFT.
    """

    ours: Callable[[Case, int], lp.PEFTMethod]
    peft: Callable[[Case, int], nn.Module] | None = None
    what: str = ""
    on: tuple[str, ...] = EVERY
    lacks: Mapping[str, str] = field(default_factory=dict)
    identity: bool = True
    entry: bool = True
    steps: Callable[[Any, nn.Module], Hooks] = lambda method, model: Hooks()
    peft_steps: Callable[[Any], Hooks] = lambda model: Hooks()
    why: Mapping[str, str] = field(default_factory=dict)


def wrapped(case: Case, config: str, **options: Any) -> nn.Module:
    """The case's model under PEFT's ``config``."""
    import peft

    return peft.get_peft_model(case.model, getattr(peft, config)(**options))


def lora(what: str = "", ours: Mapping[str, Any] = {}, theirs: Mapping[str, Any] = {}, **row: Any) -> Method:
    """A row of LoRA with ``alpha = 2 r`` and the options of both libraries."""

    def peft(case: Case, r: int) -> nn.Module:
        return wrapped(case, "LoraConfig", r=r, lora_alpha=2 * r, target_modules=case.targets, **theirs)

    return Method(lambda case, r: lp.LoRA(r=r, alpha=2 * r, targets=case.targets, **ours), peft, what, **row)


def lora_fa(case: Case, r: int) -> nn.Module:
    """PEFT's LoRA-FA: LoRA with A frozen by ``create_lorafa_optimizer``."""
    model = wrapped(case, "LoraConfig", r=r, lora_alpha=2 * r, target_modules=case.targets)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    return model


def adalora(case: Case, r: int) -> lp.PEFTMethod:
    return lp.AdaLoRA(init_r=r + 4, target_r=r, alpha=2 * r, targets=case.targets, total_step=10_000)


def adalora_steps(method: Any, model: nn.Module) -> Hooks:
    return Hooks(gradients=lambda: method.regularize(model), stepped=lambda: method.allocate(model))


def peft_adalora(case: Case, r: int) -> nn.Module:
    options = {"init_r": r + 4, "target_r": r, "lora_alpha": 2 * r, "total_step": 10_000}
    return wrapped(case, "AdaLoraConfig", target_modules=case.targets, **options)


def peft_adalora_steps(model: Any) -> Hooks:
    steps = itertools.count(1)
    return Hooks(stepped=lambda: model.base_model.update_and_allocate(next(steps)))


def dylora_steps(method: Any, model: nn.Module) -> Hooks:
    steps = itertools.count()
    return Hooks(begin=lambda: method.sample(model, next(steps)))


def bottleneck(preset: str, what: str, **row: Any) -> Method:
    """A row of a bottleneck preset with width 64."""
    return Method(lambda case, r: lp.BottleneckAdapter(preset, bottleneck_size=64), None, what, **row)


def sequence(
    config: str,
    ours: Callable[[list[str]], lp.PEFTMethod],
    what: str,
    lacks: Mapping[str, str] | None = None,
    **options: Any,
) -> Method:
    """A row of a method on the token sequence. The classifier trains too, because it always does in PEFT."""

    def peft(case: Case, r: int) -> nn.Module:
        task = "SEQ_CLS" if case.head == "classifier" else "CAUSAL_LM"
        return wrapped(case, config, task_type=task, num_virtual_tokens=TOKENS, **options)

    def make(case: Case, r: int) -> lp.PEFTMethod:
        return ours(["classifier"] if case.head == "classifier" else [])

    return Method(make, peft, what, on=TRANSFORMERS, lacks=lacks or {}, identity=False)


METHODS: dict[str, Method] = {
    "full": Method(lambda case, r: lp.FullFineTuning(), what="every parameter", entry=False),
    "last layers": Method(
        lambda case, r: lp.LastLayers(n=1), what="the last block and the head; backward ends there", entry=False
    ),
    "linear probe": Method(lambda case, r: lp.LinearProbe(), what="the head; backward ends there", entry=False),
    "BitFit": Method(lambda case, r: lp.BitFit(), what="biases", on=("bert", "resnet")),
    "norm tuning": Method(
        lambda case, r: lp.NormTuning(),
        lambda case, r: wrapped(case, "LNTuningConfig", target_modules=case.norms),
        "scales and shifts of norm layers",
    ),
    "LoRA": lora("rank r"),
    "rsLoRA": lora("rank r", {"use_rslora": True}, {"use_rslora": True}),
    "LoRA, dropout": lora("rank r, dropout 0.1", {"dropout": 0.1}, {"lora_dropout": 0.1}),
    "LoRA-FA": Method(
        lambda case, r: lp.LoRA(r=r, alpha=2 * r, targets=case.targets, freeze_A=True), lora_fa, "rank r, A frozen"
    ),
    "PiSSA": lora(
        "rank r, from the largest singular values",
        {"init": "pissa"},
        {"init_lora_weights": "pissa"},
        lacks={"resnet": "takes no convolution"},
        why={
            "saved": "the base is not changed. A second pair of factors subtracts the initial update, so their r "
            "activations and the differences B - B0 and A - A0 are saved as well. PEFT changes the base "
            "instead."
        },
    ),
    "DoRA": Method(
        lambda case, r: lp.DoRA(r=r, alpha=2 * r, targets=case.targets),
        lambda case, r: wrapped(case, "LoraConfig", r=r, lora_alpha=2 * r, target_modules=case.targets, use_dora=True),
        "rank r",
    ),
    "AdaLoRA": Method(
        adalora,
        peft_adalora,
        "rank r + 4 falling to r",
        steps=adalora_steps,
        peft_steps=peft_adalora_steps,
        why={
            "saved": "r + 4 channels of each convolution are saved. PEFT forms the full update and convolves with it a "
            "second time, which saves less and takes a third longer."
        },
    ),
    "DyLoRA": Method(
        lambda case, r: lp.DyLoRA(r=r, alpha=2 * r, targets=case.targets), what="rank up to r", steps=dylora_steps
    ),
    "VeRA": Method(
        lambda case, r: lp.VeRA(r=8 * r, targets=case.targets),
        lambda case, r: wrapped(case, "VeraConfig", r=8 * r, target_modules=case.targets),
        "rank 8 r",
        lacks={"resnet": "takes no convolution"},
    ),
    "LoHa": Method(
        lambda case, r: lp.LoHa(r=r, alpha=r, targets=case.targets),
        lambda case, r: wrapped(case, "LoHaConfig", r=r, alpha=r, target_modules=case.targets),
        "rank r squared",
    ),
    "LoKr": Method(
        lambda case, r: lp.LoKr(r=r, alpha=r, targets=case.targets),
        lambda case, r: wrapped(case, "LoKrConfig", r=r, alpha=r, target_modules=case.targets),
        "rank r in the larger factor",
    ),
    "OFT": Method(
        lambda case, r: lp.OFT(block_size=16, targets=case.targets),
        lambda case, r: wrapped(
            case, "OFTConfig", oft_block_size=16, target_modules=case.targets, use_cayley_neumann=False
        ),
        "blocks of 16, exact inverse",
        lacks={"resnet": "rotates the input of a strided or padded convolution wrongly"},
    ),
    "MiSS": Method(
        lambda case, r: lp.MiSS(r=r, targets=case.targets),
        lambda case, r: wrapped(case, "MissConfig", r=r, target_modules=case.targets),
        "shards of r",
        lacks={"resnet": "takes no convolution"},
    ),
    "IA3": Method(
        lambda case, r: lp.IA3(targets=case.keys_values, feedforward_targets=case.feedforward),
        lambda case, r: wrapped(
            case,
            "IA3Config",
            target_modules=[*case.keys_values, *case.feedforward],
            feedforward_modules=case.feedforward,
        ),
        "keys, values and the hidden layer of each feed-forward; every convolution's output",
    ),
    "SSF": Method(lambda case, r: lp.SSF(), what="after every linear layer, convolution and norm"),
    "bottleneck, Houlsby": bottleneck("houlsby", "64 wide, after attention and feed-forward", on=TRANSFORMERS),
    "bottleneck, Pfeiffer": bottleneck("pfeiffer", "64 wide, after feed-forward", on=TRANSFORMERS),
    "bottleneck, parallel": bottleneck("parallel", "64 wide, beside feed-forward", on=TRANSFORMERS),
    "prefix": sequence(
        "PrefixTuningConfig",
        lambda heads: lp.PrefixTuning(TOKENS, trainable=heads),
        f"{TOKENS} keys and values",
        NO_CACHE,
    ),
    "prefix, network": sequence(
        "PrefixTuningConfig",
        lambda heads: lp.PrefixTuning(TOKENS, bottleneck_size=64, trainable=heads),
        f"{TOKENS} keys and values computed by a network of width 64",
        NO_CACHE,
        prefix_projection=True,
        encoder_hidden_size=64,
    ),
    "prompt": sequence(
        "PromptTuningConfig", lambda heads: lp.PromptTuning(TOKENS, trainable=heads), f"{TOKENS} tokens"
    ),
    "P-tuning": sequence(
        "PromptEncoderConfig",
        lambda heads: lp.PTuning(TOKENS, hidden_size=64, trainable=heads),
        f"{TOKENS} tokens computed by an MLP of width 64",
        encoder_hidden_size=64,
    ),
    "visual prompts": Method(
        lambda case, r: lp.VisualPromptTuning(TOKENS), what=f"{TOKENS} tokens", on=("vit",), identity=False
    ),
    "visual prompts, deep": Method(
        lambda case, r: lp.VisualPromptTuning(TOKENS, deep=True),
        what=f"{TOKENS} tokens in each block",
        on=("vit",),
        identity=False,
    ),
}


def of_defaults(method: type[lp.WeightMethod]) -> Method:
    """The row of a weight method without its own entry: its rank, if it has one, on the case's targets."""
    converter = next((c for c in CONVERTERS if method in c.methods), None)

    def options(r: int) -> dict[str, int]:
        return {"r": r} if "r" in {argument.name for argument in attrs.fields(method)} else {}

    def peft(case: Case, r: int) -> nn.Module:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        config = PEFT_TYPE_TO_CONFIG_MAPPING[converter.peft_type].__name__
        return wrapped(case, config, target_modules=case.targets, **options(r))

    ours: Callable[[Case, int], lp.PEFTMethod] = lambda case, r: method(targets=case.targets, **options(r))  # noqa: E731
    return Method(ours, None if converter is None else peft, "its default arguments")


#: methods that are not measured, each with its reason
NOT_MEASURED = {
    "GatedLoRA": "LoRA and one product with a vector for each layer",
    "GradualUnfreezing": "the trained parameters change during training, from the head to everything",
}

_WITHOUT_A_ROW = [
    m for m in exported() if issubclass(m, lp.WeightMethod) and m.__name__ not in {*METHODS, *NOT_MEASURED}
]
METHODS |= {method.__name__: of_defaults(method) for method in _WITHOUT_A_ROW}
