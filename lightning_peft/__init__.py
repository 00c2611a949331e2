"""Parameter-efficient fine-tuning as Lightning callbacks, for any LightningModule.

Example::

    import lightning as L
    import lightning_peft as lp

    trainer = L.Trainer(callbacks=[lp.LoRA(r=8, targets="all-linear", trainable=["classifier"])])
    trainer.fit(MyOwnModule(), datamodule)  # checkpoints hold the trainable state only
"""

from lightning_peft.core.adapters.activation import ActivationAdapter
from lightning_peft.core.adapters.base import Adapter, WeightAdapter
from lightning_peft.core.adapters.low_rank import LowRankAdapter
from lightning_peft.core.batching.layout import RowError
from lightning_peft.core.injection.apply import apply, inspect
from lightning_peft.core.injection.checks import InjectionError
from lightning_peft.core.injection.merge import MergeError, merge, unmerge
from lightning_peft.core.injection.remove import delete_adapter
from lightning_peft.core.injection.remove_reparameterization import fold
from lightning_peft.core.injection.reset import reset
from lightning_peft.core.injection.scale import scale
from lightning_peft.core.injection.unload import unload
from lightning_peft.core.record import trainable_parameters
from lightning_peft.core.state.report import Report
from lightning_peft.core.state.state_dict import StateError, adapter_state
from lightning_peft.core.switching.active import active, disabled, set_active
from lightning_peft.core.switching.adapter_drop import adapter_drop
from lightning_peft.core.switching.rows import rows
from lightning_peft.core.switching.status import status
from lightning_peft.core.targeting.linear_like import register_linear
from lightning_peft.core.targeting.packed import register_quantized
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.describe import describe
from lightning_peft.formats.load import load_adapter
from lightning_peft.formats.save import save_adapter
from lightning_peft.methods.adalora import AdaLoRA
from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.bottleneck import BottleneckAdapter
from lightning_peft.methods.combine import combine, to_lora
from lightning_peft.methods.dora import DoRA
from lightning_peft.methods.dylora import DyLoRA
from lightning_peft.methods.families.activation import ActivationMethod
from lightning_peft.methods.families.method import PEFTMethod
from lightning_peft.methods.families.selection import SelectionMethod
from lightning_peft.methods.families.weight import WeightMethod
from lightning_peft.methods.full import FullFineTuning
from lightning_peft.methods.gated_lora import GatedLoRA
from lightning_peft.methods.gradual import GradualUnfreezing
from lightning_peft.methods.hira import HiRA
from lightning_peft.methods.ia3 import IA3
from lightning_peft.methods.last_layers import LastLayers
from lightning_peft.methods.linear_probe import LinearProbe
from lightning_peft.methods.loha import LoHa
from lightning_peft.methods.lokr import LoKr
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.miss import MiSS
from lightning_peft.methods.norm_tuning import NormTuning
from lightning_peft.methods.oft import OFT
from lightning_peft.methods.p_tuning import PTuning
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.quantize_base import QuantizeBase
from lightning_peft.methods.ssf import SSF
from lightning_peft.methods.vera import VeRA
from lightning_peft.methods.visual_prompt_tuning import VisualPromptTuning
from lightning_peft.trainer.audit import AuditError
from lightning_peft.trainer.audit_calls import audit
from lightning_peft.trainer.frozen_cache.callback import CacheFrozen
from lightning_peft.trainer.load_from_checkpoint import load_from_checkpoint
from lightning_peft.trainer.logs.monitor import AdapterMonitor
from lightning_peft.trainer.retention import Retention
from lightning_peft.trainer.together.callback import TrainTogether

__version__ = "0.1.0"

__all__ = [
    "IA3",
    "OFT",
    "SSF",
    "ActivationAdapter",
    "ActivationMethod",
    "AdaLoRA",
    "Adapter",
    "AdapterMonitor",
    "AuditError",
    "BitFit",
    "BottleneckAdapter",
    "CacheFrozen",
    "DoRA",
    "DyLoRA",
    "FormatError",
    "FullFineTuning",
    "GatedLoRA",
    "GradualUnfreezing",
    "HiRA",
    "InjectionError",
    "LastLayers",
    "LinearProbe",
    "LoHa",
    "LoKr",
    "LoRA",
    "LowRankAdapter",
    "MergeError",
    "MiSS",
    "NormTuning",
    "PEFTMethod",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "QuantizeBase",
    "Report",
    "Retention",
    "RowError",
    "SelectionMethod",
    "StateError",
    "TargetError",
    "TrainTogether",
    "VeRA",
    "VisualPromptTuning",
    "WeightAdapter",
    "WeightMethod",
    "active",
    "adapter_drop",
    "adapter_state",
    "apply",
    "audit",
    "combine",
    "delete_adapter",
    "describe",
    "disabled",
    "fold",
    "inspect",
    "load_adapter",
    "load_from_checkpoint",
    "merge",
    "register_linear",
    "register_quantized",
    "reset",
    "rows",
    "save_adapter",
    "scale",
    "set_active",
    "status",
    "to_lora",
    "trainable_parameters",
    "unload",
    "unmerge",
]
