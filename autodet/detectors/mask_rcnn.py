"""Mask R-CNN (He et al. 2017) with a feature pyramid: torchvision's model, a Faster R-CNN with a mask branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN

from autodet.detectors import faster_rcnn
from autodet.detectors.dims import Named
from autodet.detectors.faster_rcnn import (
    MMDET_REGIONS,
    FasterRCNNSteps,
    Sampled,
    describe_rcnn,
    poolable,
    rcnn_options,
    unsaid_rcnn,
)
from autodet.detectors.mask_branch import (
    MASK_LAYERS,
    build_mask_branch,
    describe_mask_branch,
    mask_counts,
    mask_groups,
    mask_logits,
    mask_losses,
    mmdet_names,
    read_mask_branch,
    unsaid_mask_branch,
    with_masks,
)
from autodet.detectors.pyramid import build_backbone, check_rebuilt
from autodet.detectors.spec import DetectorSpec
from autodet.detectors.state import MMDet, Read, State
from autodet.detectors.steps import Dense, Family, Features, Inputs, Target


class MaskRCNNSteps(FasterRCNNSteps):
    """The steps of ``detectors.steps.Masked`` on a torchvision MaskRCNN, which is used as it is, not copied."""

    def region_losses(self, inputs: Inputs, features: Features, sampled: Sampled) -> dict[str, Tensor]:
        """The second stage's losses, of its masks too."""
        losses, image_sizes = super().region_losses(inputs, features, sampled), inputs.images.image_sizes
        return losses | mask_losses(
            self.model.roi_heads, poolable(features), sampled, image_sizes, inputs.ground_truth()
        )

    def selected(self, inputs: Inputs, features: Features, dense: Dense) -> list[Target]:
        """The detections after NMS, boxes still in the canvas's pixels, masks R×1×M×M still in their boxes."""
        found = super().selected(inputs, features, dense)
        return with_masks(self.model.roi_heads, poolable(features), found, inputs.images.image_sizes)

    def region_masks(self, inputs: Inputs, features: Features, proposals: list[Tensor]) -> Tensor:
        """The mask branch's logits on given proposals."""
        return mask_logits(self.model.roi_heads, poolable(features), proposals, inputs.images.image_sizes)


def build_mask_rcnn(spec: DetectorSpec) -> MaskRCNN:
    """A torchvision MaskRCNN with fresh weights from torch's generator; parameter names are torchvision's."""
    return MaskRCNN(build_backbone(spec), **rcnn_options(spec), **build_mask_branch(spec))


def describe_mask_rcnn(model: MaskRCNN, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
    """The spec of a user's torchvision Mask R-CNN, read off its modules; SpecError where a spec cannot say a part."""
    fields = describe_rcnn(model, labels) | describe_mask_branch(model.roi_heads)
    spec = DetectorSpec(family="mask_rcnn", **fields)
    with torch.device("meta"):
        check_rebuilt(model, build_mask_rcnn(spec), _unsaid)
    return spec


def _unsaid(model: MaskRCNN) -> dict[str, object]:
    """Settings that a spec has no field for."""
    return unsaid_rcnn(model) | unsaid_mask_branch(model.roi_heads)


def read_mask_rcnn(state: State) -> Read | None:
    """Classes and fields that the heads' tensors tell."""
    masks, found = read_mask_branch(state), faster_rcnn.read_faster_rcnn(state)
    return (found[0], found[1] | masks) if masks and found is not None else None


def head_groups(spec: DetectorSpec) -> Named:
    """Channels of the proposal network's, the box head's and the mask head's layers."""
    yield from faster_rcnn.head_groups(spec)
    yield from mask_groups(spec)


def head_counts(spec: DetectorSpec) -> dict[str, int]:
    """Channels of those layers."""
    return faster_rcnn.head_counts(spec) | mask_counts(spec)


FAMILY = Family(
    model=MaskRCNN,
    steps=MaskRCNNSteps,
    build=build_mask_rcnn,
    describe=describe_mask_rcnn,
    read=read_mask_rcnn,
    head_groups=head_groups,
    head_counts=head_counts,
    class_layers=faster_rcnn.FAMILY.class_layers,
    mask_layers=MASK_LAYERS,
    mmdet=MMDet(
        mark="roi_head.mask_head.conv_logits.weight",
        names=(*faster_rcnn.MMDET_NAMES, *mmdet_names()),
        spec=MMDET_REGIONS,
    ),
)
