"""The table of docs/support.md: the operations that an adapter of each method supports, and a reason for every hole.

``python -m tests.lists`` writes the page. ``tests/test_features.py`` tests every cell: a feature
works if the table says so, and a hole is refused with an error that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning_peft as lp

FEATURES = {
    "save, load": "after `lp.save_adapter`, `lp.load_adapter` on a new base gives the same outputs",
    "to PEFT": "`peft.PeftModel.from_pretrained` reads the saved adapter and gives the same outputs",
    "from PEFT": "`lp.load_adapter` reads an adapter that PEFT saved and gives the same outputs",
    "merge": "`lp.merge` folds the adapter into the base, and the outputs do not change",
    "unmerge": "`lp.unmerge` restores the base bit for bit",
    "rows": "`lp.rows` runs two adapters of the method, a LoRA and the base in one batch; each row gets its own result",
    "combine": "`lp.combine` makes one adapter from two, with positive and negative weights",
}

_PLACES = {"target_modules": ["q_proj", "down_proj"]}


@dataclass(frozen=True)
class Row:
    """One method, or one configuration of a method.

    Attributes:
        method: its class.
        options: its arguments.
        theirs: the equivalent PEFT configuration, as class name and arguments; in a hole, the name it would have.
        base: the tiny model for the tests: ``"llama"``, with biases and an untied head, or ``"vit"``.
    """

    method: Callable[..., lp.PEFTMethod]
    options: Mapping[str, Any] = field(default_factory=dict)
    theirs: tuple[str, Mapping[str, Any]] = ("", {})
    base: str = "llama"

    def make(self, name: str = "default") -> lp.PEFTMethod:
        return self.method(**self.options, name=name)


def _on_weights(method: Any, theirs: tuple[str, dict[str, Any]], **options: Any) -> Row:
    config, arguments = theirs
    return Row(method, {"targets": _PLACES["target_modules"], **options}, (config, {**_PLACES, **arguments}))


def _lora(theirs: dict[str, Any] | None = None, **options: Any) -> Row:
    return _on_weights(lp.LoRA, ("LoraConfig", {"r": 2, "lora_alpha": 5, **(theirs or {})}), r=2, alpha=5, **options)


_PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}

ROWS: dict[str, Row] = {
    "LoRA": _lora(),
    "LoRA(use_rslora=True)": _lora({"use_rslora": True}, use_rslora=True),
    'LoRA(init="pissa")': _lora({"init_lora_weights": "pissa"}, init="pissa"),
    'LoRA(init="olora")': _lora({"init_lora_weights": "olora"}, init="olora"),
    "LoRA(lora_plus_ratio=16)": _lora(lora_plus_ratio=16),
    "LoRA(freeze_A=True)": _lora(freeze_A=True),
    'LoRA(bias="all")': _lora({"bias": "all"}, bias="all"),
    "LoRA(lora_bias=True)": _lora({"lora_bias": True}, lora_bias=True),
    "LoRA(trainable_tokens=[3, 5])": _lora({"trainable_token_indices": [3, 5]}, trainable_tokens=[3, 5]),
    'LoRA(trainable=["lm_head"])': _lora({"modules_to_save": ["lm_head"]}, trainable=["lm_head"]),
    "DoRA": _on_weights(lp.DoRA, ("LoraConfig", {"r": 2, "use_dora": True}), r=2),
    "AdaLoRA": _on_weights(
        lp.AdaLoRA,
        ("AdaLoraConfig", {"target_r": 1, "init_r": 2, "total_step": 100}),
        target_r=1,
        init_r=2,
        total_step=100,
    ),
    "DyLoRA": _on_weights(lp.DyLoRA, ("DyLoraConfig", {}), r=2),
    "VeRA": _on_weights(lp.VeRA, ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}), r=4),
    "LoHa": _on_weights(lp.LoHa, ("LoHaConfig", {"r": 2}), r=2),
    "LoKr": _on_weights(lp.LoKr, ("LoKrConfig", {"r": 1}), r=1),
    "OFT": _on_weights(lp.OFT, ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}), block_size=4),
    "MiSS": _on_weights(lp.MiSS, ("MissConfig", {"r": 4}), r=4),
    'MiSS(variant="mini")': _on_weights(
        lp.MiSS,
        ("MissConfig", {"r": 4, "mini_r": 2, "init_weights": "mini"}),
        r=4,
        mini_r=2,
        variant="mini",
    ),
    'MiSS(variant="bat")': _on_weights(lp.MiSS, ("MissConfig", {"r": 4, "init_weights": "bat"}), r=4, variant="bat"),
    "HiRA": _on_weights(lp.HiRA, ("HiraConfig", {"r": 2}), r=2),
    "IA3": Row(lp.IA3, {}, ("IA3Config", {**_PLACES, "feedforward_modules": ["down_proj"]})),
    "SSF": _on_weights(lp.SSF, ("SSFConfig", {})),
    "GatedLoRA": _on_weights(lp.GatedLoRA, ("GatedLoraConfig", {}), r=2),
    "BottleneckAdapter": Row(lp.BottleneckAdapter, {"bottleneck_size": 3}, ("BottleneckConfig", {})),
    "PrefixTuning": Row(lp.PrefixTuning, {"num_virtual_tokens": 3}, ("PrefixTuningConfig", _PROMPT)),
    "PrefixTuning(shift_positions=True)": Row(
        lp.PrefixTuning, {"num_virtual_tokens": 3, "shift_positions": True}, ("PrefixTuningConfig", _PROMPT)
    ),
    "PrefixTuning(gate=True)": Row(
        lp.PrefixTuning, {"num_virtual_tokens": 3, "gate": True}, ("PrefixTuningConfig", {**_PROMPT, "gate": True})
    ),
    "PromptTuning": Row(lp.PromptTuning, {"num_virtual_tokens": 3}, ("PromptTuningConfig", _PROMPT)),
    'PromptTuning(position="suffix")': Row(
        lp.PromptTuning,
        {"num_virtual_tokens": 3, "position": "suffix"},
        ("PromptTuningConfig", {**_PROMPT, "position": "suffix"}),
    ),
    "PTuning": Row(
        lp.PTuning, {"num_virtual_tokens": 3}, ("PromptEncoderConfig", {**_PROMPT, "encoder_hidden_size": 8})
    ),
    "VisualPromptTuning": Row(
        lp.VisualPromptTuning, {"num_virtual_tokens": 2}, ("VisualPromptTuningConfig", {}), base="vit"
    ),
    "VisualPromptTuning(deep=True)": Row(
        lp.VisualPromptTuning, {"num_virtual_tokens": 2, "deep": True}, ("VisualPromptTuningConfig", {}), base="vit"
    ),
    "FullFineTuning": Row(lp.FullFineTuning, {}, ("FullFineTuningConfig", {})),
    "LinearProbe": Row(lp.LinearProbe, {}, ("LinearProbeConfig", {})),
    "LastLayers": Row(lp.LastLayers, {"n": 1}, ("LastLayersConfig", {})),
    "GradualUnfreezing": Row(lp.GradualUnfreezing, {}, ("GradualUnfreezingConfig", {})),
    "BitFit": Row(lp.BitFit, {}, ("BitFitConfig", {})),
    "NormTuning": Row(lp.NormTuning, {}, ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]})),
}


@dataclass(frozen=True)
class Hole:
    """The reason why a cell is empty, and a part of its error message."""

    reason: str
    error: str


def _holes(feature: str, reason: str, errors: dict[str, str]) -> dict[tuple[str, str], Hole]:
    """Holes of several rows with one reason; ``errors`` maps each row to a part of its error message."""
    return {(row, part): Hole(reason, error) for row, error in errors.items() for part in feature.split(" and ")}


_IN_BASE = "the method trains a part of the base itself, which is not an adapter in PEFT; it is saved in our own format"
_NONE = "PEFT does not have this method; it is saved in our own format"
_UNKNOWN = "PEFT does not have this method, so there are no PEFT files to read"
_NO_WEIGHT = "the method changes activations, not weights, so there is nothing to merge or to combine"
_ADDED = {"DyLoRA": "DyLoRA", "SSF": "SSF", "GatedLoRA": "GatedLoRA", "BottleneckAdapter": "BottleneckAdapter"}
_VISUAL = dict.fromkeys(["VisualPromptTuning", "VisualPromptTuning(deep=True)"], "VisualPromptTuning")
_SELECTED = {name: name for name in ("FullFineTuning", "LinearProbe", "LastLayers", "GradualUnfreezing", "BitFit")}
_FLOW = [row for row in ROWS if row.startswith(("GatedLoRA", "Bottleneck", "Prefix", "Prompt", "PTuning", "Visual"))]

HOLES: dict[tuple[str, str], Hole] = {
    **_holes("to PEFT", _NONE, _ADDED | _VISUAL),
    **_holes("from PEFT", _UNKNOWN, {row: ROWS[row].theirs[0] for row in _ADDED | _VISUAL | _SELECTED}),
    **_holes("to PEFT", _IN_BASE, _SELECTED),
    **_holes(
        "to PEFT",
        "PEFT counts positions from the end of the prefix; use `shift_positions=True`, which does the same",
        {"PrefixTuning": "shift_positions=True"},
    ),
    **_holes("to PEFT", "PEFT's prefix tuning does not have a gate", {"PrefixTuning(gate=True)": "have no gate"}),
    **_holes("from PEFT", "PEFT's prefix tuning does not have a gate", {"PrefixTuning(gate=True)": "'gate'"}),
    **_holes(
        "to PEFT",
        "PEFT always puts the prompt first",
        {'PromptTuning(position="suffix")': "always puts the prompt first"},
    ),
    **_holes("from PEFT", "PEFT always puts the prompt first", {'PromptTuning(position="suffix")': "'position'"}),
    **_holes("merge and unmerge and combine", _NO_WEIGHT, dict.fromkeys(_FLOW, "does not change weights")),
    **_holes(
        "combine",
        "the method also changes biases, which a LoRA cannot do; IA3 does so on layers with a bias, as in this model",
        dict.fromkeys(["LoRA(lora_bias=True)", "IA3", "SSF"], "changes more than a matrix"),
    ),
}


def footnotes() -> dict[str, int]:
    """The footnote number of each reason, in the order of the table."""
    holes = (HOLES.get((row, feature)) for row in ROWS for feature in FEATURES)
    return {reason: i for i, reason in enumerate(dict.fromkeys(h.reason for h in holes if h is not None), 1)}


def page() -> str:
    """The documentation page."""
    numbers = footnotes()

    def cell(row: str, feature: str) -> str:
        hole = HOLES.get((row, feature))
        return "yes" if hole is None else f"no [{numbers[hole.reason]}]"

    lines = [
        "# Supported combinations",
        "",
        "A test covers every cell: it runs each `yes` on a tiny Hugging Face model, and checks that each `no` is",
        "refused with an error that says why. `python -m tests.lists` writes this page.",
        "",
        f"| | {' | '.join(FEATURES)} |",
        f"|---|{'---|' * len(FEATURES)}",
        *(f"| `{row}` | {' | '.join(cell(row, feature) for feature in FEATURES)} |" for row in ROWS),
        "",
        *(f"- **{feature}**: {meaning}." for feature, meaning in FEATURES.items()),
        "",
        "The tests use loaded adapters. A loaded adapter has its own copies of the base parameters that its method",
        "trained (heads, biases, norms). They replace the base's values, so they can be switched, merged and used in",
        "rows like any adapter.",
        "",
        "## Reasons",
        "",
        *(f"{number}. {reason}" for reason, number in numbers.items()),
    ]
    return "\n".join(lines) + "\n"
