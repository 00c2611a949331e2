"""The library in models and LightningModules of other packages, each with random weights and a tiny configuration."""

import torch


def _let_torchvision_import() -> None:
    """Declare the operators of torchvision's compiled part where it does not load, as beside a CPU build of torch.

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


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # what it declares goes with it
_let_torchvision_import()
