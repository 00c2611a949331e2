"""Methods with training hooks that the module itself applies, so that the Trainer does not call the hooks."""

from __future__ import annotations

import pytest

import lightning_peft as lp
from tests.trainer.toys import Toy, loader, trainer


class Applies(Toy):
    """Applies a method in its constructor."""

    def __init__(self, method: lp.PEFTMethod) -> None:
        super().__init__()
        lp.apply(self, method)


@pytest.mark.parametrize("kind", [lp.DyLoRA, lp.AdaLoRA, lp.GradualUnfreezing])
def test_a_method_whose_training_hooks_are_not_called_is_reported(tmp_path, kind):
    method = kind(targets=["body.0", "body.4"], trainable=["head"])
    with pytest.raises(lp.AuditError, match=rf"{kind.__name__} 'default' was applied by the module, and this Trainer"):
        trainer(tmp_path, method=False, max_steps=1).fit(Applies(method), loader())


def test_it_may_be_both_applied_and_passed_to_the_trainer(tmp_path):
    method = lp.DyLoRA(r=2, targets=["body.0"], trainable=["head"])
    trainer(tmp_path, method=method, max_steps=1).fit(Applies(method), loader())


def test_a_method_without_training_hooks_needs_no_callback(tmp_path):
    trainer(tmp_path, method=False, max_steps=1).fit(Applies(lp.LoRA(r=2, targets=["body.0"])), loader())
