"""Merge into a weight that a module computes from other parameters, by changing those parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_peft.core.names import join, leaf, owner_of
from lightning_peft.core.targeting.computed_weights import sources_of, write_computed

__all__ = ["shared_source", "write_back"]


def shared_source(host_name: str, host: nn.Module, name: str, shared: Mapping[str, list[str]]) -> str | None:
    """Return why the parameters of the computed weight ``name`` must not change; None if no other module holds them.

    Args:
        host_name: the name of the module with adapters.
        host: that module.
        name: the weight's name in it.
        shared: the names of each tensor that several modules hold, by each of these names.
    """
    path = owner_of(name)
    for key in sources_of(host.get_submodule(path), leaf(name)):
        full = join(host_name, path, key)
        if full in shared:
            others = ", ".join(other for other in shared[full] if other != full)
            return f"{join(host_name, name)} is computed from {full}, which is the same tensor as {others}"
    return None


def write_back(host_name: str, host: nn.Module, name: str, weight: Tensor) -> dict[str, Tensor]:
    """Change the parameters of the computed weight ``name`` so that the module computes ``weight``.

    Returns:
        Their previous values, by name in the host.

    Raises:
        ValueError: if these parameters cannot express ``weight``; nothing was changed.
    """
    try:
        return write_computed(host, name, weight)
    except ValueError as error:
        raise ValueError(
            f"{join(host_name, name)} is computed from other parameters (spectral norm, pruning, a parametrization), "
            f"and the merged weight cannot be written back into them: {error}. Run it unmerged, or remove the "
            f"parametrization before you apply methods: torch.nn.utils.parametrize.remove_parametrizations(layer, "
            f"{leaf(name)!r}), torch.nn.utils.remove_spectral_norm(layer) or prune.remove(layer, {leaf(name)!r})"
        ) from error
