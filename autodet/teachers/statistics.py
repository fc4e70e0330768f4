"""Norm statistics of a member: measured on images, since those of the shared weights belong to no member."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from autodet.data import Batch, Loader
from autodet.detectors import Detector

IMAGES, BATCH = 256, 16  # that statistics are measured on; OFA takes 2,000 of ImageNet [fewer: ours]


def measure_statistics(detector: Detector, loader: Loader) -> None:
    """Replace the body's running means and variances by averages over a sample of the loader's images.

    The sample is the same every time. (Yu & Huang 2019, post-statistics.)
    """
    recalibrate(detector, loader.sample(BATCH, IMAGES))


def recalibrate(detector: Detector, batches: Iterable[Batch]) -> None:
    """Replace the body's running means and variances by averages over batches, of which each weighs alike.

    Modes and weights stay as they are.
    """
    device = next(detector.model.parameters()).device

    def tensors() -> Iterator[Tensor]:
        for batch in batches:
            yield detector.preprocess([image.to(device) for image in batch.images]).images.tensors

    backbone = detector.model.get_submodule("backbone")
    with torch.no_grad():
        update_bn(tensors(), backbone)


def statistics_of(detector: Detector) -> dict[str, Tensor]:
    """All that ``measure_statistics`` changes of the norms, by their names in the plain model's state dict."""
    return {
        f"{prefix}.{name}": buffer
        for prefix, module in detector.model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for name, buffer in module.named_buffers()
    }
