"""Compare the layers of torch.nn, timm and PyTorch Geometric that are linear with those that ``all-linear`` includes.

``python -m tests.integration.packages.probe > docs/linear_layers.md`` writes the page. Every class is built from small
default arguments, and each layer inside that holds a matrix is called with vectors. It is linear if the output is
x W^T or x W, plus a constant, for one of its parameters W. This is compared with what ``all-linear`` includes.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.targeting.sites import weight_sites

__all__ = ["PACKAGES", "Found", "page", "probe"]

#: the module that defines layers, by the name of the package on the index
PACKAGES = {"torch": "torch.nn", "timm": "timm.layers", "torch-geometric": "torch_geometric.nn"}
_INPUTS = ("in_features", "in_channels", "input_size", "embed_dim", "d_model", "dim", "num_features", "channels", "nf")
_SIZES = dict.fromkeys(_INPUTS, 8) | {
    **dict.fromkeys(("out_features", "out_channels", "hidden_size", "hidden_channels", "num_classes"), 6),
    **dict.fromkeys(("num_embeddings", "num_channels", "normalized_shape", "embedding_dim", "nhead", "num_heads"), 8),
    **dict.fromkeys(("in1_features", "in2_features", "out_dim", "in_dim", "hidden_dim", "edge_dim"), 8),
    **dict.fromkeys(
        ("num_types", "num_groups", "num_layers", "heads", "num_relations", "K", "kernel_size", "depth"), 2
    ),
}


@dataclass(frozen=True)
class Found:
    """One layer class: whether it computes a linear layer, and whether ``all-linear`` includes it."""

    name: str
    linear: bool
    included: bool


def probe(package: str) -> tuple[list[Found], int]:
    """Return the layers of ``package`` that hold a matrix, and the number of classes that could not be built."""
    found: dict[str, Found] = {}
    not_built = 0
    for cls in _classes(package):
        built = _build(cls)
        not_built += built is None
        for layer in built.modules() if built is not None else ():
            name = type(layer).__name__
            own = type(layer).__module__.startswith(PACKAGES[package])
            if own and name not in found and _is_layer(layer):
                sites = weight_sites(nn.ModuleDict({"layer": layer}))
                included = any(site.linear_like for site in sites.values())
                found[name] = Found(name, _is_linear(layer), included)
    return [found[name] for name in sorted(found)], not_built


def _is_layer(module: nn.Module) -> bool:
    children = any(True for _ in module.children()) and not isinstance(module, nn.MultiheadAttention)
    return not children and any(p.ndim > 1 for p in module.parameters())


def _classes(package: str) -> list[type[nn.Module]]:
    members = vars(import_module(PACKAGES[package])).items()
    found = [cls for name, cls in sorted(members) if isinstance(cls, type) and "Lazy" not in name]
    return [cls for cls in dict.fromkeys(found) if issubclass(cls, nn.Module)]


def _build(cls: type[nn.Module]) -> nn.Module | None:
    parameters = inspect.signature(cls).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    sizes = (8, 6) if issubclass(cls, nn.RNNBase) else ()  # torch declares them as *args
    if not all(p.name in _SIZES for p in needed):
        return None
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            return cls(*sizes, **{p.name: _SIZES[p.name] for p in needed})
        except Exception:  # a class may need other arguments than its signature says
            return None


@torch.no_grad()
def _is_linear(layer: nn.Module) -> bool:
    """Whether the output for vectors is x W^T or x W plus a constant, twice in training and once in evaluation mode."""
    layer = layer.double()
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter))
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    return any(_computes(layer, w) for p in matrices for w in (p, p.mT))


def _computes(layer: Any, weight: Tensor) -> bool:
    x = torch.randn(5, weight.shape[1], dtype=torch.float64)
    try:
        for training in (True, True, False):
            layer.train(training)
            if not torch.allclose(layer(x) - layer(torch.zeros_like(x)), x @ weight.mT, rtol=1e-9, atol=1e-9):
                return False
    except Exception:  # it does not take vectors of this width
        return False
    return True


def page() -> str:
    """The documentation page."""
    lines = [
        "# Which layers `all-linear` includes",
        "",
        "For each package, this probe builds every layer class that small default arguments can build. It calls each",
        "layer that holds a matrix with vectors. A layer counts as linear if its output is x Wᵀ or x W, plus a",
        "constant, for one of its parameters W. Recurrent layers and attentions multiply by several matrices, and",
        "`all-linear` includes these on purpose. Layers that `all-linear` leaves out can be named in `targets`.",
        "`python -m tests.integration.packages.probe > docs/linear_layers.md` writes this page.",
        "",
        "| package | layers with a matrix | linear and included | not linear, left out | included, several matrices "
        "| linear, not included | not built |",
        "|---|---|---|---|---|---|---|",
    ]
    for package in PACKAGES:
        found, not_built = probe(package)

        def names(linear: bool, included: bool, found: list[Found] = found) -> str:
            return ", ".join(f"`{f.name}`" for f in found if (f.linear, f.included) == (linear, included)) or "none"

        lines.append(
            f"| {package} {metadata.version(package).partition('+')[0]} | {len(found)} | {names(True, True)} "
            f"| {names(False, False)} | {names(False, True)} | {names(True, False)} | {not_built} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
