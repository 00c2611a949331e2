import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_peft as lp
from tests.methods.fitting import (
    BATCHES,
    TOKENS,
    ConvNet,
    bert,
    encoder,
    fit_and_resume,
    gpt2,
    llama,
    moved,
    run,
    seeded,
)

PRESETS = ["houlsby", "pfeiffer", "parallel", "scaled_parallel", "adapterplus"]
MODELS = [bert, llama, gpt2, encoder]
IMAGES = torch.linspace(-3, 3, 2 * 3 * 8 * 8).cos().view(2, 3, 8, 8)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_count_identity_and_disabled(make, preset):
    model, x = make(), BATCHES[make]
    method = lp.BottleneckAdapter(preset, bottleneck_size=4)
    with torch.no_grad():
        base = run(model, x)
        d, m, places = 16, 4, 6 if preset == "houlsby" else 3
        each = 2 * m * d + d + m + (d if preset == "adapterplus" else 0)  # its scale for each channel
        assert lp.apply(model, method).trainable == places * each
        start = 1e-2 if preset == "adapterplus" else 2e-6  # that one starts near its base
        assert (run(model, x) - base).abs().max() < start
        changed = run(moved(model), x)
        assert (changed - base).abs().max() > 1e-2
        with lp.disabled(model):
            torch.testing.assert_close(run(model, x), base, rtol=1e-5, atol=2e-6)
        assert torch.equal(run(copy.deepcopy(model), x), changed)
        assert torch.equal(run(pickle.loads(pickle.dumps(model)), x), changed)
        fresh = make()
        lp.apply(fresh, lp.BottleneckAdapter(**method.config()))
        fresh.load_state_dict(lp.adapter_state(model), strict=False)
        assert torch.equal(run(fresh, x), changed)
        torch.testing.assert_close(run(lp.unload(fresh), x), base, rtol=1e-5, atol=2e-6)
        with pytest.raises(lp.MergeError, match=r"Bottleneck|InputCapture"):
            lp.merge(model)
        assert torch.equal(run(model, x), changed)


class Reference(nn.Module):
    """A post-norm transformer encoder layer, in evaluation, with adapters written into it by hand."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, adapters: dict[str, list[Tensor]], parallel: bool, scale: float, f) -> Tensor:
        layer, attention = self.layer, self.layer.self_attn
        q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        split = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)]
        weights = (split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5).softmax(-1)
        sub = attention.out_proj((weights @ split[2]).transpose(1, 2).flatten(2))

        def adapted(place: str, x: Tensor, y: Tensor) -> Tensor:
            if place not in adapters:
                return y
            down, down_bias, up, up_bias = adapters[place]
            hidden = f((x if parallel else y) @ down.T + down_bias)
            return y + scale * (hidden @ up.T + up_bias)

        x = layer.norm1(x + adapted("attention", x, sub))
        sub = layer.linear2(torch.relu(layer.linear1(x)))
        return layer.norm2(x + adapted("feedforward", x, sub))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("function", ["relu", "gelu", "swish", "tanh"])
def test_against_a_reference_in_double(parallel, function):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double().eval()
    model = nn.Sequential(layer)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    reference = Reference(copy.deepcopy(layer))
    lp.apply(
        model,
        lp.BottleneckAdapter(
            "houlsby",
            bottleneck_size=3,
            parallel=parallel,
            non_linearity=function,
            scaling=1.5,
            adapter_dtype="float64",
        ),
    )
    moved(model)
    place = {"attention": layer.self_attn, "feedforward": layer.linear2}
    mine = {n: list(m.adapters["default"].parameters()) for n, m in place.items()}
    theirs = {n: [p.detach().clone().requires_grad_() for p in ps] for n, ps in mine.items()}
    f = {"relu": torch.relu, "gelu": F.gelu, "swish": F.silu, "tanh": torch.tanh}[function]
    a, b = model(x), reference(x, theirs, parallel, 1.5, f)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    a.square().sum().backward()
    b.square().sum().backward()
    for name in mine:
        for p, q in zip(mine[name], theirs[name]):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)


def test_parallel_reads_the_input_of_the_whole_sublayer():
    # BERT's feed-forward is two modules of its layer; the adapter must see what goes into the first.
    model = bert()
    lp.apply(model, lp.BottleneckAdapter("parallel", bottleneck_size=4))
    moved(model)
    layer = model.encoder.layer[0]
    x = torch.randn(2, 5, 16)
    adapter = layer.output.dense.adapters["default"]
    with lp.disabled(model):
        plain = layer.output.dense(layer.intermediate(x))
        contribution = adapter.up(torch.relu(adapter.down(x)))
        expected = layer.output.LayerNorm(plain + contribution + x)
    torch.testing.assert_close(layer.output(layer.intermediate(x), x), expected)


def test_an_interrupted_forward_leaves_nothing_that_cannot_be_copied():
    model = encoder()
    lp.apply(model, lp.BottleneckAdapter("parallel", bottleneck_size=4))
    model.layers[0].linear1(BATCHES[encoder].clone().requires_grad_() * 2)  # and never reaches linear2
    assert model.layers[0].linear1.adapters["default"].captured is not None
    assert copy.deepcopy(model).layers[0].linear1.adapters["default"].captured is None
    pickle.dumps(model)


@pytest.mark.parametrize("preset", ["houlsby", "parallel"])
@pytest.mark.parametrize("make", [bert, llama, encoder])
def test_compile_without_graph_breaks(make, preset):
    torch._dynamo.reset()
    model, x = make(), BATCHES[make]
    lp.apply(model, lp.BottleneckAdapter(preset, bottleneck_size=4, gate=True), lp.LoRA(name="second"))
    expected = run(moved(model, 0.05), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x), expected)
    torch.testing.assert_close(run(compiled, x), expected)


@pytest.mark.parametrize("preset", ["houlsby", "parallel"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(preset, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = bert()
        model.config.hidden_dropout_prob = 0.0
        lp.apply(model, lp.BottleneckAdapter(preset, bottleneck_size=4))
        moved(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        run(model, TOKENS).square().mean().backward()
        gradients.append([p.grad for p in lp.trainable_parameters(model)])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_fast_path_of_the_encoder_does_not_skip_the_adapters():
    model, x = encoder(), BATCHES[encoder]
    lp.apply(model, lp.BottleneckAdapter("houlsby", bottleneck_size=4))
    moved(model)
    with torch.no_grad():
        fast = model.eval()(x, src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
        slow = model.train()(x, src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_feature_maps_get_one_by_one_convolutions():
    model = seeded(ConvNet)
    base = model(IMAGES)
    report = lp.apply(model, lp.BottleneckAdapter(targets="all-blocks", bottleneck_size=2))
    assert report.trainable == 4 * (2 * 2 * 8 + 8 + 2)
    torch.testing.assert_close(model(IMAGES), base)
    moved(model)
    block = model.layer1[0]
    x = torch.randn(2, 8, 5, 5)
    adapter = block.adapters["default"]
    with lp.disabled(model):
        plain = block(x)
    hidden = F.conv2d(plain, adapter.down.weight[..., None, None], adapter.down.bias).relu()
    expected = plain + F.conv2d(hidden, adapter.up.weight[..., None, None], adapter.up.bias)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_sequential_is_adapted_from_its_first_to_its_last_layer(parallel):
    model = seeded(ConvNet)
    report = lp.apply(model, lp.BottleneckAdapter(targets="layer1", bottleneck_size=2, parallel=parallel))
    assert report.trainable == 2 * 2 * 8 + 8 + 2
    assert len(model.layer1) == 2
    moved(model)
    x = torch.randn(2, 8, 5, 5)
    adapter = model.layer1[1].adapters["default"]
    with lp.disabled(model):
        plain = model.layer1(x)
    read = x if parallel else plain
    hidden = F.conv2d(read, adapter.down.weight[..., None, None], adapter.down.bias).relu()
    expected = plain + F.conv2d(hidden, adapter.up.weight[..., None, None], adapter.up.bias)
    torch.testing.assert_close(model.layer1(x), expected)


def test_options():
    x = BATCHES[encoder]
    for options in (
        {"norm_before": True},
        {"norm_after": True},
        {"gate": True},
        {"scaling": "learned"},
        {"scaling": "channel"},
    ):
        model = encoder()
        base = run(model, x)
        count = lp.apply(model, lp.BottleneckAdapter(bottleneck_size=4, **options)).trainable
        extra = {"norm_before": 32, "norm_after": 32, "gate": 17, "learned": 1, "channel": 16}
        assert count == 3 * (2 * 4 * 16 + 16 + 4 + extra[options.get("scaling") or next(iter(options))])
        torch.testing.assert_close(run(model, x), base)
        for _ in range(2):  # everything learns, whichever factor starts at zero
            run(model, x).sin().sum().backward()
            for p in lp.trainable_parameters(model):
                p.data -= 0.1 * p.grad
                assert p.grad.isfinite().all()
        assert all(p.grad.abs().max() > 0 for p in lp.trainable_parameters(model))
    model = encoder()
    base = run(model, x)
    lp.apply(model, lp.BottleneckAdapter(bottleneck_size=4, init="bert"))
    assert (run(model, x) - base).abs().max() > 1e-5  # not the base's function


def test_dropout_and_stochastic_depth_act_in_training_only():
    for options in ({"dropout": 0.5}, {"stochastic_depth": 0.5}):
        model = encoder()
        lp.apply(model, lp.BottleneckAdapter(bottleneck_size=4, **options))
        moved(model)
        x = torch.randn(1, 5, 16).expand(64, 5, 16)
        plain = model(x)
        torch.testing.assert_close(plain[0], plain[1])
        noisy = model.train()(x)
        assert not torch.equal(noisy[0], noisy[1])
    adapter = model.layers[0].linear2.adapters["default"]
    rows = adapter._change(x).abs().sum((1, 2))
    assert 10 < (rows == 0).sum() < 54  # whole rows are left out


def test_sizes_by_pattern():
    model = encoder()
    lp.apply(model, lp.BottleneckAdapter(bottleneck_size={"default": 4, "re:.*layers\\.0\\..*|layers\\.0\\..*": 2}))
    assert [layer.linear2.adapters["default"].size for layer in model.layers] == [2, 4, 4]
    model = encoder()
    lp.apply(model, lp.BottleneckAdapter(reduction_factor={"default": 8, "layers.2.linear2": 2}))
    assert [layer.linear2.adapters["default"].size for layer in model.layers] == [2, 2, 8]


def test_explicit_arguments_override_the_preset():
    method = lp.BottleneckAdapter("houlsby", non_linearity="gelu", targets="all-feedforward")
    assert (method.non_linearity, method.targets, method.reduction_factor) == ("gelu", "all-feedforward", 16)
    assert lp.BottleneckAdapter(**method.config()).config() == method.config()


def test_half_precision_base():
    model, x = encoder().bfloat16(), BATCHES[encoder].bfloat16()
    lp.apply(model, lp.BottleneckAdapter("parallel", bottleneck_size=4, norm_before=True, gate=True))
    assert run(moved(model), x).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in lp.trainable_parameters(model))
    with torch.autocast("cpu", torch.bfloat16):
        model = encoder()
        lp.apply(model, lp.BottleneckAdapter("houlsby", bottleneck_size=4))
        run(moved(model), BATCHES[encoder]).float().sum().backward()
    assert all(p.grad is not None for p in lp.trainable_parameters(model))


@pytest.mark.parametrize("preset", ["houlsby", "parallel"])
def test_fit(tmp_path, preset):
    fit_and_resume(lambda: lp.BottleneckAdapter(preset, bottleneck_size=4, dropout=0.1, trainable="head"), tmp_path)


def test_bad_input():
    with pytest.raises(ValueError, match="preset must be one of 'houlsby'"):
        lp.BottleneckAdapter("hulsby")
    with pytest.raises(ValueError, match="remove one of the two"):
        lp.BottleneckAdapter(bottleneck_size=4, reduction_factor=4)
    with pytest.raises(ValueError, match=r"bottleneck_size must be an integer"):
        lp.BottleneckAdapter(bottleneck_size=0)
    with pytest.raises(ValueError, match=r"reduction_factor must be a number above 0"):
        lp.BottleneckAdapter(reduction_factor=-1)
    with pytest.raises(
        ValueError, match="scaling must be 'learned', 'channel' or a finite number other than 0, got 'x'"
    ):
        lp.BottleneckAdapter(scaling="x")
    with pytest.raises(ValueError, match=r"reduction_factor=96 is larger than the 16 features of 'layers.0.linear2'"):
        lp.apply(encoder(), lp.BottleneckAdapter("adapterplus"))
    with pytest.raises(ValueError, match=r"has no value for 'layers.1.linear2': add a matching pattern or a 'default'"):
        lp.apply(encoder(), lp.BottleneckAdapter(bottleneck_size={"layers.0.linear2": 4}))
    with pytest.raises(lp.TargetError, match="bottleneck_size: 'linear3' matches nothing; nearest: linear2"):
        lp.apply(encoder(), lp.BottleneckAdapter(bottleneck_size={"default": 4, "linear3": 4}))
    with pytest.raises(lp.TargetError, match=r"matches 'layer1.0' in two ways"):
        lp.apply(ConvNet(), lp.BottleneckAdapter("parallel", targets=["layer1", "layer1.0"]))
    with pytest.raises(lp.TargetError, match=r"looks like feed-forward .*'Block'.*all-blocks"):
        lp.apply(ConvNet(), lp.BottleneckAdapter())
    with pytest.raises(
        ValueError, match=r"'layers.0.linear1': its input has 16 features and its output 32. Exclude it"
    ):
        lp.apply(encoder(), lp.BottleneckAdapter("parallel", targets=["layers.0.linear1"]))
    strided = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2))
    lp.apply(strided, lp.BottleneckAdapter("parallel", targets=["0"], bottleneck_size=2))
    with pytest.raises(ValueError, match=r"'0': its input has shape \(2, 3, 8, 8\) and its output \(2, 3, 3, 3\)"):
        strided(IMAGES)


@pytest.mark.parametrize(
    ("preset", "model", "count"),
    [
        # BERT base: 12 x (2 x 48 x 768 + 48 + 768); Houlsby's twice that. Both are AdapterHub's counts too.
        ("pfeiffer", "Bert", 894_528),
        ("houlsby", "Bert", 1_789_056),
        # He et al.: 512 at a width of 1024; at BERT's 768 half of it.
        ("parallel", "Bert", 12 * (2 * 384 * 768 + 384 + 768)),
        ("scaled_parallel", "Bert", 12 * (2 * 384 * 768 + 384 + 768)),
        # Adapter+ of the rank 8 that 768 / 96 gives, on ViT-B/16.
        ("adapterplus", "ViT", 12 * (2 * 8 * 768 + 8 + 768 + 768)),
    ],
)
def test_presets_have_the_papers_sizes_on_base_models(preset, model, count):
    import transformers

    with torch.device("meta"):
        base = getattr(transformers, f"{model}Model")(getattr(transformers, f"{model}Config")())
    assert lp.inspect(base, lp.BottleneckAdapter(preset)).trainable == count
