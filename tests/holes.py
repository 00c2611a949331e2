"""The holes of the table in ``tests/table.py``, each with its reason."""

from __future__ import annotations

from tests.kinds import KINDS

ANY = "*"

_READS = "dropout acts on a layer's input; here the module reads the weight itself"
_NOT_CALLED = "its layers are read and not called: an error at the first forward, or by the audit"
_NO_VECTORS = "the gate reads the vectors that a linear layer is called with"
_SHARED = "its three projections share one bias, which cannot change with one of them"
_NO_SHIFT = "an embedding or a bare parameter has no bias, a recurrent layer two for one sum, so it cannot have a shift"
_NO_INPUT = "an embedding is called with ids, which nothing can scale"
_NO_MODULE = "bare parameters: no module gives an output to change"
_NO_ATTENTION = "nothing here attends, or one module attends for several layers"
_NO_SEQUENCE = "no module takes and returns a sequence of embeddings"
_NO_PATCHES = "no blocks with attention in one stack"
_NO_HEAD = "no layer stands apart as the output's"
_NO_BIAS = "its layers were built without biases"
_NO_NORM = "no norm layers"
_NOTHING_FIRST = "there is no head, so nothing would train before the first block unfreezes"

_ATTEND = [name for name, kind in KINDS.items() if kind.keys]
_MLPS = ["linear", "linear_4d", "other_linear", "weight_norm"]
_LINEAR = [*_MLPS, "fused_qkv", "llama", "gpt2", "vit"]
_READ = ["mha", "mha_batch_first", "mha_kdim", "encoder", "experts", "scaled"]
_RECURRENT = ["recurrent", "cells"]
_LOOKED_UP = ["embedding", "tied", "scaled"]


def _on(kinds: list[str], reason: str, error: str, *methods: str) -> dict[tuple[str, str], tuple[str, str]]:
    return {(method, kind): (reason, error) for method in methods for kind in kinds}


def _but(kinds: list[str]) -> list[str]:
    return [kind for kind in KINDS if kind not in kinds]


#: (method, kind) -> why the method cannot be applied, and a part of its error message
REFUSED: dict[tuple[str, str], tuple[str, str]] = {
    **_on([*_READ, *_RECURRENT], _READS, "dropout", "lora_dropout"),
    **_on(_but(_LINEAR), _NO_VECTORS, "not called with vectors", "gated_lora"),
    **_on(["mha_kdim"], _SHARED, "shares the bias", "ia3", "ssf"),
    **_on([*_LOOKED_UP, "experts", *_RECURRENT], _NO_SHIFT, "cannot have a shift", "ssf"),
    **_on(_LOOKED_UP, _NO_INPUT, "no input to scale", "ia3_inputs"),
    **_on(["experts"], _NO_MODULE, "matches nothing", "bottleneck"),
    **_on(_but(_ATTEND), _NO_ATTENTION, "finds no attention", "prefix", "prefix_gate"),
    **_on(_but([n for n, k in KINDS.items() if k.tokens]), _NO_SEQUENCE, "finds no module", "prompt", "ptuning"),
    **_on(_but(_ATTEND), _NO_PATCHES, "finds no repeated blocks", "visual_prompt", "visual_prompt_deep"),
    **_on([n for n, k in KINDS.items() if k.head is None], _NO_HEAD, "finds no output head", "linear_probe"),
    **_on([n for n, k in KINDS.items() if k.head is None], _NOTHING_FIRST, "nothing to train before", "gradual"),
    **_on(["llama"], _NO_BIAS, "finds no bias", "bitfit"),
    **_on(_but(["resnet", "encoder", "llama", "gpt2", "vit"]), _NO_NORM, "finds no norm", "norm_tuning"),
}

_TIED = "one tensor under two names: a merge into one would change the other, and is refused"
_NORMS = "parameters of norm layers train, so these layers are not frozen: their statistics move, and are saved"
_IDS = "reentrant checkpointing gives gradients only where an input takes one; token ids take none"
_NEW_BIAS = "a layer without a bias has one afterwards, the shift"
_MORE_THAN_PATCHES = "its blocks get masks, positions or keys for the tokens they know: an error at the first forward"
_FAST_PATH = "torch's own fast path of nn.TransformerEncoder fails under autocast on the CPU, with no method as well"
_OUTSIDE_THE_LAYERS = ("full", "last_layers", "bitfit", "norm_tuning", "prompt", "ptuning")

#: (method, kind, invariant) -> why it is not tested
HOLES: dict[tuple[str, str, str], str] = {
    (ANY, "tied", "merge"): _TIED,
    (ANY, "tied", "merge_float64"): _TIED,
    (ANY, "tied", "merge_two"): _TIED,
    (ANY, "tied", "merge_unload"): _TIED,
    (
        ANY,
        "weight_norm",
        "copies",
    ): "torch does not pickle parametrized layers; tests/core/adapters/test_reads.py copies",
    **{(ANY, kind, "checkpointing_reentrant"): _IDS for kind in ("embedding", "tied", "scaled", "llama", "gpt2")},
    **{(method, "reads", ANY): _NOT_CALLED for method in ("lora_dropout", "bottleneck")},
    ("lora_dropout", ANY, "modes"): "random while training",
    ("hira_dropout", ANY, "modes"): "random while training",
    **{
        (method, "resnet", invariant): _NORMS
        for method in ("lora_bias", "full", "last_layers", "bitfit")
        for invariant in ("modes", "training")
    },
    (ANY, "llama", "merge_float64"): "its RMSNorm and rotary embedding compute in float32 whatever the model's type",
    **{(method, "encoder", "autocast"): _FAST_PATH for method in _OUTSIDE_THE_LAYERS},
    ("last_layers", "encoder", "modes"): "torch's fast path looks at the first layer for what trains, and so fails",
    ("gradual", ANY, "count"): "counts what trains by now; what will is held in tests/methods/test_gradual.py",
    **{("ssf", kind, "merge_unload"): _NEW_BIAS for kind in (*_MLPS, "conv1d", "conv_transpose", "resnet", "llama")},
    **{
        (method, kind, ANY): _MORE_THAN_PATCHES
        for method in ("visual_prompt", "visual_prompt_deep")
        for kind in _ATTEND
        if kind != "vit"
    },
    ("lora_freeze_A", ANY, "all_train"): "that one factor does not train is what it is",
}
