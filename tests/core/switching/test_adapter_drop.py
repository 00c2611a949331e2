import pytest
import torch

import lightning_peft as lp
from tests.methods.fitting import BATCHES, encoder, moved, run


def test_blocks_run_without_their_adapters_and_with_them_again():
    model, x = encoder(), BATCHES[encoder]
    base = run(model, x)
    lp.apply(model, lp.BottleneckAdapter("parallel", bottleneck_size=4))
    full = run(moved(model), x)
    with lp.adapter_drop(model, 1) as left_out:
        assert left_out == ("layers.0.linear1", "layers.0.linear2")
        dropped = run(model, x)
        assert not torch.equal(dropped, full)
    for stack in (model.layers[0].linear1.adapters, model.layers[0].linear2.adapters):
        stack.active = ()
        stack.refresh()
    assert torch.equal(run(model, x), dropped)
    lp.set_active(model, "default")
    assert torch.equal(run(model, x), full)
    with lp.adapter_drop(model, 3):
        torch.testing.assert_close(run(model, x), base, rtol=1e-5, atol=2e-6)
    with lp.adapter_drop(model, [0, -2]) as left_out:
        assert {name.split(".")[1] for name in left_out} == {"0", "1"}
    with lp.adapter_drop(model, 0) as left_out:
        assert left_out == ()
        assert torch.equal(run(model, x), full)


def test_one_adapter_of_two():
    model, x = encoder(), BATCHES[encoder]
    lp.apply(model, lp.BottleneckAdapter(bottleneck_size=4), lp.LoRA(name="lora"))
    moved(model)
    with lp.adapter_drop(model, 3, name="default"):
        a = run(model, x)
    with lp.active(model, "lora"):
        assert torch.equal(run(model, x), a)


def test_bad_input():
    model = encoder()
    lp.apply(model, lp.SSF(targets="layers.0.linear1"))
    for blocks in (4, -1, [3]):
        with pytest.raises(ValueError, match="the model has 3 blocks"), lp.adapter_drop(model, blocks):
            pass
    with pytest.raises(ValueError, match=r"no adapters to skip in layers.2"), lp.adapter_drop(model, [2]):
        pass
    with pytest.raises(ValueError, match="no adapter named 'x'"), lp.adapter_drop(model, 1, name="x"):
        pass
    lp.merge(model)
    with pytest.raises(ValueError, match="unmerge"), lp.adapter_drop(model, 1):
        pass
