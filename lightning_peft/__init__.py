"""Parameter-efficient fine-tuning as Lightning callbacks, for any LightningModule.

Example::

    import lightning as L
    import lightning_peft as lp

    trainer = L.Trainer(callbacks=[lp.LoRA(r=8, targets="all-linear", trainable=["classifier"])])
    trainer.fit(MyOwnModule(), datamodule)  # checkpoints hold the trainable state only
"""

from lightning_peft.core.adapter import Adapter, WeightAdapter
from lightning_peft.core.host import active, disabled, set_active
from lightning_peft.core.inject import InjectionError, apply, inspect, trainable_parameters
from lightning_peft.core.merge import MergeError, merge, unload, unmerge
from lightning_peft.core.report import Report
from lightning_peft.core.state import StateError, adapter_state
from lightning_peft.core.targets import TargetError
from lightning_peft.methods.callback import PEFTMethod
from lightning_peft.methods.dora import DoRA
from lightning_peft.methods.loha import LoHa
from lightning_peft.methods.lokr import LoKr
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.oft import OFT
from lightning_peft.methods.vera import VeRA
from lightning_peft.methods.weight import WeightMethod
from lightning_peft.trainer.audit import AuditError
from lightning_peft.trainer.checkpoint import load_from_checkpoint

__version__ = "0.1.0"

__all__ = [
    "OFT",
    "Adapter",
    "AuditError",
    "DoRA",
    "InjectionError",
    "LoHa",
    "LoKr",
    "LoRA",
    "MergeError",
    "PEFTMethod",
    "Report",
    "StateError",
    "TargetError",
    "VeRA",
    "WeightAdapter",
    "WeightMethod",
    "active",
    "adapter_state",
    "apply",
    "disabled",
    "inspect",
    "load_from_checkpoint",
    "merge",
    "set_active",
    "trainable_parameters",
    "unload",
    "unmerge",
]
