"""With virtual tokens, a generation step from a KV cache gives the same as the whole sequence without a cache."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core import kv_cache as caches
from lightning_peft.methods.families import prompt_adapters as sequence
from lightning_peft.methods.shared.cached_step import CacheError
from tests.methods.tiny import llama, randomise

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = {
    "llama": ("Llama", {**SMALL, "intermediate_size": 48}),
    "bloom": ("Bloom", {"vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {**SMALL, "alibi": True}),
    "mpt": ("Mpt", {"vocab_size": 40, "d_model": 32, "n_heads": 4, "n_layers": 2, "use_cache": True}),
    "opt": ("OPT", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mistral": ("Mistral", {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 6}),
    "mamba": ("Mamba", {"vocab_size": 40, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}),
    "rwkv": ("Rwkv", {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
}
IDS = torch.arange(4, 12)[None]


def causal(name: str) -> nn.Module:
    kind, options = CAUSAL[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("position", ["prefix", "suffix"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_every_generated_step_equals_the_sequence_without_a_cache(name, position):
    base = causal(name)
    model = copy.deepcopy(base)
    lp.apply(model, lp.PromptTuning(3, position=position))
    randomise(model, 0.5)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    try:
        out = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    except (CacheError, sequence.TokenError):
        assert name == "rwkv"  # its state is a list of tensors that does not show whether it is filled
        return
    prompt = next(p for n, p in model.named_parameters() if n.endswith("prompt"))[None]
    embed = base.get_input_embeddings()
    parts = [prompt, embed(IDS)] if position == "prefix" else [embed(IDS), prompt]
    for i, step in enumerate(out.logits):
        whole = torch.cat([*parts, embed(out.sequences[:, 8 : 8 + i])], 1)
        torch.testing.assert_close(step, base(inputs_embeds=whole, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("mpt", {}), ("llama", {"use_cache": False})])
@torch.no_grad()
def test_a_suffix_does_not_move_along_with_the_generated_text(name, options):
    """MPT's own default is ``use_cache=False``."""
    kind, arguments = CAUSAL[name]
    config = getattr(transformers, f"{kind}Config")(**{**arguments, **options, "use_cache": False}, pad_token_id=0)
    models = {p: getattr(transformers, f"{kind}ForCausalLM")(config).eval() for p in ("prefix", "suffix")}
    options = {**options, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False}
    for position, model in models.items():
        lp.apply(model, lp.PromptTuning(3, position=position))
    assert models["prefix"].generate(IDS, **options).shape == (1, 11)
    for _ in range(2):
        with pytest.raises(CacheError, match="generates without a KV cache"):
            models["suffix"].generate(IDS, **options)
    assert models["suffix"].generate(IDS, **{**options, "use_cache": True}).shape == (1, 11)
    for i in range(4):  # separate texts
        models["suffix"](IDS + i)
        models["suffix"](IDS[:, :5])


class Attends(nn.Module):
    """Uniform causal attention with a cache; each subclass chooses the cache's name and structure."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.out = nn.Linear(8, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def step(self, embeds: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        whole = embeds if past is None else torch.cat([past, embeds], 1)
        means = whole.cumsum(1) / torch.arange(1, whole.shape[1] + 1)[:, None]
        return self.out(means[:, -embeds.shape[1] :]), whole


class Tuples(Attends):
    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, layer_past=None, use_cache=True):
        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        hidden, whole = self.step(embeds, None if layer_past is None else layer_past[0][0])
        return {"hidden": hidden, "layer_past": ((whole, whole),)}


class Counts:
    def __init__(self, whole: Tensor) -> None:
        self.whole = whole

    def get_seq_length(self) -> int:
        return self.whole.shape[1]


class Objects(Attends):
    state = Counts

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, memory=None, use_cache=True):
        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        hidden, whole = self.step(embeds, None if memory is None else memory.whole)
        return {"hidden": hidden, "memory": self.state(whole)}


@pytest.mark.parametrize("kind", [Tuples, Objects])
@torch.no_grad()
def test_a_cache_of_any_name(kind):
    model = kind().eval()
    lp.apply(model, lp.PromptTuning(3, init="random"))
    (name,) = caches.states_in(model(IDS[:, :5]))
    first = model(IDS[:, :5])
    step = model(IDS[:, 5:], **{name: first[name]})["hidden"]
    torch.testing.assert_close(step, model(IDS)["hidden"][:, 5:])


@torch.no_grad()
def test_a_cache_that_is_not_understood_is_an_error():
    class Silent:
        def __init__(self, whole: Tensor) -> None:
            self.whole, self.ssm_states = whole, torch.zeros(1)  # a cache that always looks empty

    class Stranger(Objects):
        state = Silent

    model = Stranger().eval()
    lp.apply(model, lp.PromptTuning(3, init="random"))
    for _ in range(2):  # the second call too, because a caught error must not turn the check off
        with pytest.raises(CacheError, match=r"step of Stranger with the cache 'memory' \(Silent\).*use_cache=False"):
            model(IDS)


@pytest.mark.parametrize(
    "method",
    [lp.PromptTuning(3), lp.PTuning(3), lp.PrefixTuning(3, shift_positions=True)],
    ids=lambda m: type(m).__name__,
)
@torch.no_grad()
def test_a_cache_that_goes_unrecognised_is_an_error(method, monkeypatch):
    """The situation after a release of transformers renamed the cache argument."""
    model = llama()
    lp.apply(model, method)
    randomise(model, 0.5)
    for module in (
        "lightning_peft.methods.families.prompt_adapters.filled_cache",
        "lightning_peft.methods.prefix_tuning.find_cache",
    ):
        monkeypatch.setattr(module, lambda values: None)
    for _ in range(2):
        with pytest.raises(CacheError, match="differs from the computation without it"):
            model.generate(IDS, max_new_tokens=2, do_sample=False)


@torch.no_grad()
def test_the_check_runs_once_and_draws_no_random_numbers():
    model, calls = llama(), []
    lp.apply(model, lp.PromptTuning(3))
    model.get_submodule("model.layers.0").register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    model(IDS)
    assert len(calls) == 4
    assert torch.equal(state, torch.get_rng_state())
    model(IDS)
    assert len(calls) == 5


def test_a_training_step_looks_its_tokens_up_once():
    model, calls = llama(), []
    lp.apply(model, lp.PrefixTuning(3, shift_positions=True))
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    model.train()(IDS)
    assert len(calls) == 1
