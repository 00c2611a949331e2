"""Tests with models and LightningModules of other packages, with random weights and tiny configurations."""

import torch


def _let_torchvision_import() -> None:
    """Declare torchvision's compiled operators if they do not load, as with a CPU build of torch.

    Its models are plain Python; only the import needs the declarations.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # its declarations are removed with it
_let_torchvision_import()
