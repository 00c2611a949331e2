"""Advice in error messages is in Python in Python, and in flags on the command line."""

from __future__ import annotations

import lightning as L
import pytest

import lightning_peft as lp
from lightning_peft.cli.flags import in_flags
from lightning_peft.cli.main import main
from lightning_peft.data import TextClassificationData
from lightning_peft.tasks import TextClassifier

OWNERS = {"method": lp.LoRA, "model": TextClassifier, "data": TextClassificationData, "trainer": L.Trainer}


@pytest.mark.parametrize(
    ("python", "flags"),
    [
        ("use lp.DoRA", "use --method DoRA"),
        ("or use lp.FullFineTuning()", "or use --method FullFineTuning"),
        (
            "as lp.LoRA(r=8, targets=['q_proj', 'v_proj']).",
            "as --method LoRA --method.r=8 --method.targets=[q_proj,v_proj].",
        ),
        ('set trainable=["classifier"].', "set --method.trainable=[classifier]."),
        (
            "dropout=0.1 is not supported. Set dropout=0, or",
            "--method.dropout=0.1 is not supported. Set --method.dropout=0, or",
        ),
        ("set audit='warn' or 'off'", "set --method.audit=warn or 'off'"),
        ("train with strategy='ddp'.", "train with --trainer.strategy=ddp."),
        ("max_length=512: it", "--data.max_length=512: it"),
        ("num_labels=2 is", "--model.num_labels=2 is"),
        ("call self.save_hyperparameters(ignore=['lr'])", "call self.save_hyperparameters(ignore=['lr'])"),
        ("lp.load_from_checkpoint(Net, lr=1)", "lp.load_from_checkpoint(Net, lr=1)"),
        ("unknown=3 stays, and so does --method.r=4", "unknown=3 stays, and so does --method.r=4"),
    ],
)
def test_python_becomes_flags(python, flags):
    assert in_flags(python, OWNERS) == flags


def test_an_argument_of_two_classes_stays():
    assert in_flags("name='a'", {"method": lp.LoRA, "other": lp.DoRA}) == "name='a'"


def test_a_run_offers_flags_and_python_offers_python():
    demo = ["--model=TextClassifier", "--data=TextClassificationData", "--data.source=demo"]
    fast = ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--method=LoRA"]
    with pytest.raises(SystemExit) as said:
        main(["fit", *demo, *fast, "--method.targets=Wqkv,Wo"])
    assert "--method.targets=[Wqkv,Wo]" in str(said.value)
    with pytest.raises(lp.TargetError, match=r"targets=\['Wqkv', 'Wo'\]"):
        lp.inspect(TextClassifier("demo", 2), lp.LoRA(targets="Wqkv,Wo"))
