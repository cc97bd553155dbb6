"""torchvision's wheel holds the kernels of one build of torch; beside another, its Python is imported all the same.

timm and transformers import torchvision for transforms and norms, no model here calls its kernels. What stops its import is that it says
shapes for operators which its library, not loaded, should have registered.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def torchvision():
    """Declare the operators that torchvision's import asks for, where its own library does not load. Nothing where it is not installed."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
