"""What all families share: a ResNet body with a feature pyramid, the steps up to it, and how a model is described."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, cast

from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from autodet.detectors.arch import Arch, ArchError
from autodet.detectors.resnet import ResNetBody, norm_layer
from autodet.detectors.spec import ABOVE, BODY_STRIDES, DetectorSpec, SpecError
from autodet.detectors.steps import Features, Inputs, Target

HARMLESS: Final = re.compile(r"(, )?(inplace|momentum)=[^,)]+")  # what of a layer has no effect on its detections


def preprocess(model: Any, images: list[Tensor], targets: list[Target] | None) -> Inputs:
    """Images 3×h×w in [0, 1] → normalised, resized, and padded to a canvas that 32 divides; targets follow."""
    sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
    image_list, targets = model.transform(images, targets)
    return Inputs(image_list, targets, sizes)


def pyramid(model: Any, levels: Sequence[int], inputs: Inputs) -> Features:
    """Nominal stride → N×C×H×W. Above 32 sizes are rounded, so strides are nominal."""
    return dict(zip(levels, model.backbone(inputs.images.tensors).values(), strict=True))


class PlainP6P7(LastLevelP6P7):  # type: ignore[misc]  # torchvision has no types
    """torchvision's two levels above the body's without the ReLU between them, as mmdetection's usual pyramids."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Maps and names of the body's levels, and the body's own maps → both with P6 and P7 at their ends."""
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class NormedP6P7(PlainP6P7):
    """The same with a group norm on each, in a pyramid whose other convolutions have them too."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__(in_channels, out_channels)
        norm = partial(nn.GroupNorm, groups)
        layer = partial(Conv2dNormActivation, kernel_size=3, stride=2, norm_layer=norm, activation_layer=None)
        self.p6, self.p7 = layer(in_channels, out_channels), layer(out_channels, out_channels)
        for module in (self.p6[0], self.p7[0]):
            nn.init.kaiming_uniform_(module.weight, a=1)


def build_backbone(spec: DetectorSpec) -> BackboneWithFPN:
    """A body and a pyramid with fresh weights; parameter names are torchvision's."""
    body = ResNetBody(spec.body, norm_layer(spec.norm, spec.norm_eps))
    stages = [BODY_STRIDES.index(stride) for stride in spec.body_levels]
    widths = [spec.body.stages[stage].width for stage in stages]
    above: LastLevelMaxPool | LastLevelP6P7 = LastLevelMaxPool()
    if spec.top != "pool":
        kind = LastLevelP6P7 if spec.top_relu else PlainP6P7
        kind = partial(NormedP6P7, groups=spec.neck_groups) if spec.neck_groups else kind
        above = kind(widths[-1] if spec.top == "body" else spec.neck_width, spec.neck_width)
        above.use_P5 = spec.top == "neck"  # torchvision goes by the widths, which may be equal by chance
    return BackboneWithFPN(
        body,
        return_layers={f"layer{stage + 1}": str(index) for index, stage in enumerate(stages)},
        in_channels_list=widths,
        out_channels=spec.neck_width,
        extra_blocks=above,
        norm_layer=partial(nn.GroupNorm, spec.neck_groups) if spec.neck_groups else None,
    )


def describe_frame(model: Any, classes: int, labels: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """The spec's fields that are read off alike in all families; classes: those of its head, without background.

    SpecError where the labels are not as many, or a spec cannot say the body or the pyramid.
    """
    if classes != len(labels):
        raise SpecError(f"The detector has {classes} classes besides background, but {len(labels)} labels were given.")
    return {
        "labels": tuple((int(category), name) for category, name in labels),
        **describe_backbone(model.backbone),
        "min_size": model.transform.min_size[0],
        "max_size": model.transform.max_size,
    }


def describe_backbone(backbone: nn.Module) -> dict[str, Any]:
    """The spec's fields that a body and a pyramid decide; SpecError where a spec cannot say a part."""
    body, fpn = getattr(backbone, "body", None), getattr(backbone, "fpn", None)
    if body is None or not isinstance(fpn, FeaturePyramidNetwork):
        raise SpecError(f"Expected a FeaturePyramidNetwork, found {type(fpn).__name__}: no adapter for it.")
    try:
        arch = Arch.of_state_dict(body.state_dict())
    except ArchError as error:
        raise SpecError(f"Expected a ResNet as the detector's body, found another one: {error}") from error
    norm = getattr(body, "bn1", None)
    if not isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d)):
        raise SpecError(f"Expected batch norms, frozen or not, in the detector's body, found {type(norm).__name__}.")
    top = _top(fpn.extra_blocks)
    return {
        "body": arch,
        "norm": "frozen" if isinstance(norm, FrozenBatchNorm2d) else "batch",
        "norm_eps": norm.eps,
        "neck_width": backbone.out_channels,
        "levels": (*_body_levels(body, len(fpn.inner_blocks)), *ABOVE[top]),
        "top": top,
        "top_relu": not isinstance(fpn.extra_blocks, PlainP6P7),
        "neck_groups": next((part.num_groups for part in fpn.modules() if isinstance(part, nn.GroupNorm)), 0),
    }


def _top(above: nn.Module | None) -> str:
    """What the levels above the body's are made from."""
    if isinstance(above, LastLevelP6P7):
        return "neck" if above.use_P5 else "body"
    if isinstance(above, LastLevelMaxPool):
        return "pool"
    raise SpecError(f"Expected a pooled level or P6 and P7 on the pyramid, found {type(above).__name__}.")


def _body_levels(body: nn.Module, count: int) -> tuple[int, ...]:
    """Strides of the stages that a pyramid reads, which are the body's last."""
    first = len(BODY_STRIDES) - count
    expected = [f"layer{stage + 1}" for stage in range(first, len(BODY_STRIDES))]
    read = list(cast(dict[str, str], getattr(body, "return_layers", expected)))
    if read != expected:
        raise SpecError(f"Expected a pyramid on {', '.join(expected)}, found one on {', '.join(read)}.")
    return BODY_STRIDES[first:]


def unsaid_frame(model: Any, anchors: AnchorGenerator) -> dict[str, object]:
    """Settings of the images and anchors that a spec has no field for."""
    transform = model.transform
    return {
        "image_mean": tuple(transform.image_mean),
        "image_std": tuple(transform.image_std),
        "number of min_size": len(transform.min_size),
        "size_divisible": transform.size_divisible,
        "fixed_size": transform.fixed_size,
        "anchor_generator.sizes": tuple(map(tuple, anchors.sizes)),
        "anchor_generator.aspect_ratios": tuple(map(tuple, anchors.aspect_ratios)),
    }


def matching(matcher: Matcher) -> tuple[float, float, bool]:
    """What decides which anchors learn an object."""
    return matcher.high_threshold, matcher.low_threshold, matcher.allow_low_quality_matches


def check_rebuilt(model: nn.Module, rebuilt: nn.Module, unsaid: Callable[[Any], dict[str, object]]) -> None:
    """What a spec leaves unsaid is torchvision's default when it is built: SpecError where the model's own differs."""
    differing = [
        f"{name} is {value}, expected {expected}"
        for (name, value), expected in zip(unsaid(model).items(), unsaid(rebuilt).values(), strict=True)
        if value != expected
    ]
    own, other = ({key: value.shape for key, value in m.state_dict().items()} for m in (model, rebuilt))
    differing += [f"parameter {key}" for key in {**own, **other} if own.get(key) != other.get(key)]
    layers, expected_layers = _layers(model), _layers(rebuilt)
    differing += [
        f"{name} is {layers.get(name)}, expected {expected_layers.get(name)}"
        for name in {**layers, **expected_layers}
        if layers.get(name) != expected_layers.get(name)
    ]
    if differing:
        raise SpecError(f"The detector has parts that a spec cannot say: {'; '.join(differing[:4])}.")


def _layers(model: nn.Module) -> dict[str, str]:
    """Every layer by name as torch prints it, with strides, dilations, groups and eps, which no parameter shows."""
    return {
        name: HARMLESS.sub("", repr(module))
        for name, module in model.named_modules()
        if name != "transform" and next(module.children(), None) is None
    }
