import pytest
from torch import nn

from lightning_peft.core.targeting.blocks import channels_first, find_sublayers, output_width
from tests.methods.fitting import SMALL, ConvNet, bert, encoder, gpt2, llama

transformers = pytest.importorskip("transformers")


def ends(model):
    return [(s.kind[0], s.start, s.end, s.width) for s in find_sublayers(model)]


@pytest.mark.parametrize(
    ("make", "prefix", "attention", "feedforward"),
    [
        (encoder, "layers.", ("self_attn", "self_attn"), ("linear1", "linear2")),
        (llama, "layers.", ("self_attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")),
        (gpt2, "h.", ("attn", "attn.c_proj"), ("mlp", "mlp.c_proj")),
        (bert, "encoder.layer.", ("attention", "attention.output.dense"), ("intermediate", "output.dense")),
    ],
)
def test_blocks_of_common_models(make, prefix, attention, feedforward):
    expected = []
    for i in range(3):
        expected.append(("a", f"{prefix}{i}.{attention[0]}", f"{prefix}{i}.{attention[1]}", 16))
        expected.append(("f", f"{prefix}{i}.{feedforward[0]}", f"{prefix}{i}.{feedforward[1]}", 16))
    assert ends(make()) == expected


def test_encoder_and_decoder():
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50)
    found = ends(transformers.T5Model(config))
    assert [kind for kind, *_ in found] == list("afafaafaaf")
    assert found[0][1:3] == ("encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.0.SelfAttention.o")
    assert found[-1][1:3] == (
        "decoder.block.1.layer.2.DenseReluDense",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    )
    found = ends(nn.Transformer(16, 2, 2, 2, 32, batch_first=True))
    assert [kind for kind, *_ in found] == list("afafaafaaf")


def test_shared_single_layer_and_experts():
    config = transformers.AlbertConfig(**SMALL, embedding_size=16)
    found = ends(transformers.AlbertModel(config))
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    assert ("f", f"{layer}.ffn", f"{layer}.ffn_output", 16) in found
    assert ("a", f"{layer}.attention", f"{layer}.attention.dense", 16) in found
    assert len(found) == 2
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2)
    found = find_sublayers(transformers.MixtralModel(config))
    experts = found[1]
    assert (experts.start, experts.end, experts.width) == ("layers.0.mlp", "layers.0.mlp", 16)
    assert experts.outputs == ("layers.0.mlp.experts.down_proj",)


def test_a_model_of_ones_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
            self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(), nn.Linear(32, 8), nn.Dropout())

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()]), "mlp": nn.Sequential(nn.Linear(8, 2))})
    assert ends(model)[:2] == [
        ("a", "blocks.0.attention", "blocks.0.attention.proj", 8),
        ("f", "blocks.0.mlp", "blocks.0.mlp.3", 8),
    ]
    assert len(ends(model)) == 4  # the head is not one of them
    assert ends(ConvNet()) == []


@pytest.mark.parametrize(
    ("module", "width", "maps"),
    [
        (nn.Linear(3, 5), 5, False),
        (nn.Conv2d(3, 5, 1), 5, True),
        (nn.BatchNorm1d(5), 5, True),
        (nn.GroupNorm(1, 5), 5, True),
        (nn.LayerNorm((2, 5)), 5, False),
        (nn.RMSNorm(5), 5, False),
        (nn.Embedding(3, 5), 5, False),
        (nn.MultiheadAttention(4, 2), 4, False),
        (nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU()), 5, True),
        (nn.ReLU(), None, False),
    ],
)
def test_widths(module, width, maps):
    assert output_width(module) == width
    assert channels_first(module) is maps
