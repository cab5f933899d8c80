"""torchvision's wheels are CUDA builds: declare the operators it looks for when imported."""

try:
    import torch
except ImportError:
    pass
else:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
