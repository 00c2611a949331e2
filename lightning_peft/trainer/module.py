"""A mixin that adds injection, optimizer filtering and checkpoint checks to a LightningModule with methods attached.

The class of the user's module is swapped in ``Callback.setup`` for a subclass with this mixin first. The user's hooks
are unchanged, and ``super()`` calls them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.core.adapters.lookup import stack_prefixes
from lightning_peft.core.class_swap import add_mixin, original_class
from lightning_peft.core.injection.apply import apply
from lightning_peft.core.injection.reset import moved_adapters
from lightning_peft.core.names import canonical
from lightning_peft.core.record import injection_state, trainable_parameters
from lightning_peft.core.state.consistency import check_record, update_base
from lightning_peft.core.state.fingerprint import check_fingerprint
from lightning_peft.core.state.freezing import set_unfrozen
from lightning_peft.core.state.state_dict import StateError, load_state, trainable_keys
from lightning_peft.core.state.torch_file import naming
from lightning_peft.core.targeting.base_modules import local_state_dict
from lightning_peft.trainer.audit import audit_optimizers
from lightning_peft.trainer.audit_ranks import audit_methods, audit_ranks
from lightning_peft.trainer.averaging import start_averaging
from lightning_peft.trainer.bitsandbytes_precision import convert_layers, creating_layers
from lightning_peft.trainer.checkpoints.manifest import KEY, check_manifest, manifest, sealed
from lightning_peft.trainer.checkpoints.trimming import check_complete
from lightning_peft.trainer.checkpoints.unsafe_hparams import pickle_unsafe_hparams
from lightning_peft.trainer.fsdp1 import refuse_wrapped
from lightning_peft.trainer.lazy_modules import create_lazy_parameters
from lightning_peft.trainer.lifecycle import Lifecycle
from lightning_peft.trainer.logs.run_ids import continue_runs, run_ids
from lightning_peft.trainer.optimizers import add_adapters, configured, drop_frozen
from lightning_peft.trainer.param_groups import drop_empty_groups, optimizers_in, remember_schedulers
from lightning_peft.trainer.quantised_strategies import adapt_quantised
from lightning_peft.trainer.strategy import partitions_optimizers

__all__ = ["AdaptedModule", "adapt_module"]

if TYPE_CHECKING:
    import lightning as L

    _LightningModule = L.LightningModule
else:
    _LightningModule = nn.Module  # the user's module may come from lightning or pytorch_lightning


class AdaptedModule(_LightningModule):
    """Mixin for the user's LightningModule; see the docstring of this file."""

    _peft_configure_optimizers: Any = None

    def configure_model(self) -> None:
        # Adapters are injected here because this point is the same for all models: after __init__, setup and
        # configure_model have created the layers, but before the strategy shards them and the optimizer collects the
        # parameters. Earlier, layers may not exist; later, new parameters would be neither sharded nor trained.
        # fit, validate, test and the tuner all call configure_model, so apply does nothing if it already ran.
        audit_methods(_methods_of(self._trainer))
        with creating_layers(self._trainer, self):
            super().configure_model()
        if injection_state(self) is None:  # BitsandbytesPrecision quantises layers while none has adapters
            convert_layers(self._trainer, self)
        # Skipped only if the module has its own adapters and the Trainer has no method to add.
        if _methods_of(self._trainer) or injection_state(self) is None:
            create_lazy_parameters(self)
            apply(self)
        refuse_wrapped(self)
        adapt_quantised(self, getattr(self._trainer, "strategy", None))
        update_base(self)
        audit_ranks(self)  # DDP later copies rank 0's adapters to the other ranks, which would hide a difference
        start_averaging(self._trainer, self)

    def configure_callbacks(self) -> Any:
        own = super().configure_callbacks()
        own = list(own) if isinstance(own, Sequence) else [own]
        # Methods install the Lifecycle themselves; a module that loaded its own adapters needs it too.
        loaded = injection_state(self) is not None and not _methods_of(self._trainer)
        return [*own, Lifecycle()] if loaded and self.trainer.state.fn == "fit" else own

    def configure_optimizers(self) -> Any:
        result = configured(self, self._peft_configure_optimizers or super().configure_optimizers)
        optimizers = list(optimizers_in(result))
        if not optimizers:
            raise MisconfigurationException(
                f"{type(self).__name__}.configure_optimizers returned no optimizer ({result!r}), so no adapter would "
                "be trained: return an optimizer over lp.trainable_parameters(self)"
            )
        remember_schedulers(result)
        # In this order: the frozen weights in the user's groups show which group each adapter belongs to.
        add_adapters(optimizers, self)
        record = injection_state(self)
        drop_frozen(optimizers, self)
        for optimizer in optimizers:
            for method in record.methods.values() if record is not None else ():
                method.configure_param_groups(optimizer, self)
        if self._trainer is not None and partitions_optimizers(self._trainer.strategy):
            for optimizer in optimizers:
                drop_empty_groups(optimizer)
            audit_optimizers(self, optimizers)  # here, because the parameters cannot be recognised later
        return result

    @property
    def strict_loading(self) -> bool:
        return False  # frozen keys are missing by design; load_state_dict below checks the others

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        pass

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        if injection_state(self) is None:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        own = {canonical(k) for k in local_state_dict(self)}
        will_train = {id(p) for p in trainable_parameters(self)}
        train = {canonical(n) for n, p in self.named_parameters(remove_duplicate=False) if id(p) in will_train}
        base = own - trainable_keys(self) - train
        given = {canonical(k) for k in state_dict}
        if not assign and not (base and base <= given):
            load_state(self, state_dict)
            return nn.modules.module._IncompatibleKeys([], [])
        # The user loads a whole base by hand. It may lack the adapters' keys as long as these are untrained.
        if strict:
            _check_strict(self, own, given)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # After the user's hook, which may have removed keys. With some strategies only rank 0 has a complete state.
        if self._trainer is None or self._trainer.is_global_zero:
            check_complete(self, checkpoint["state_dict"], f"{original_class(self).__name__}.on_save_checkpoint")
        pickle_unsafe_hparams(checkpoint)
        checkpoint[KEY] = {**sealed(manifest(self), checkpoint["state_dict"]), **run_ids(self._trainer)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        record = injection_state(self)
        if record is not None:
            check_record(self)
            with naming(self._trainer.ckpt_path if self._trainer is not None else None):
                check_manifest(self, checkpoint)
                check_fingerprint(self, checkpoint[KEY]["fingerprint"])
            continue_runs(self._trainer, checkpoint[KEY])
            if self._trainer is not None and self._trainer.precision == "64-true":
                self.double()  # Lightning converts after loading, when the values are already rounded to float32
            set_unfrozen(self, checkpoint[KEY].get("thawed", ()))


def _methods_of(trainer: Any) -> list[Any]:
    """The methods among the callbacks of a Trainer."""
    return [c for c in trainer.callbacks if hasattr(c, "plan")] if trainer is not None else []


def adapt_module(module: Any) -> None:
    """Add the mixin to ``module``; idempotent."""
    add_mixin(module, AdaptedModule)
    # LightningCLI sets configure_optimizers on the instance, where it would take precedence over the method of the
    # mixin.
    if "configure_optimizers" in module.__dict__:
        module._peft_configure_optimizers = module.__dict__.pop("configure_optimizers")


def _check_strict(model: nn.Module, own: set[str], given: set[str]) -> None:
    adapters = {canonical(k) for k in local_state_dict(model) if k.startswith(stack_prefixes(model))}
    wrong = sorted((own - adapters - given) | (given - own))
    if wrong:
        raise StateError(
            f"the state does not fit this model: {', '.join(wrong[:8])} are in only one of the two. Load the state of "
            "the same model, or pass strict=False"
        )
    stay = adapters - given
    if stay and (moved := moved_adapters(model)):
        raise StateError(
            f"the state has no adapters, but those of this module are already trained ({moved[0]}, {len(moved)} "
            "tensors in all) and would be kept. To start again, call lp.reset(module), which resets adapters, trained "
            "parameters and moved buffers. To load the base only, pass strict=False"
        )
