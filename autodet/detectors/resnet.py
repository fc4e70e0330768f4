"""The body of a detector: a ResNet of any `Arch`, with torchvision's parameter names and numerics.

State dicts of ``torchvision.models.resnet*`` fit without their ``fc``. The classes of torchvision are not used because
they tie a block's inner width to its stage. As there, a bottleneck strides in its 3×3 convolution ("ResNet v1.5").
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from autodet.detectors.arch import Arch
from autodet.detectors.deformable import DeformableConv2d

NormLayer = Callable[[int], nn.Module]  # channels → normalisation of an N×C×H×W map


def norm_layer(kind: str, eps: float = 1e-5) -> NormLayer:
    """A maker of normalisation layers.

    "batch": BatchNorm2d. "frozen": torchvision's FrozenBatchNorm2d, whose scale and shift are buffers and never learn;
    torchvision's COCO detectors have these, with eps 0. ValueError for another kind.
    """
    if kind == "batch":
        return lambda channels: nn.BatchNorm2d(channels, eps=eps)
    if kind == "frozen":
        return lambda channels: _frozen(channels, eps)
    raise ValueError(f"expected the norm 'batch' or 'frozen', found {kind!r}")


def _frozen(channels: int, eps: float) -> nn.Module:
    module: nn.Module = FrozenBatchNorm2d(channels, eps=eps)
    return module


class BasicBlock(nn.Module):
    """3×3 to ``inner`` channels, 3×3 (the one that may be deformable) to ``width``, plus the shortcut."""

    def __init__(
        self, before: int, inner: int, width: int, stride: int, norm: NormLayer, deformable: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, inner, 3, stride, padding=1, bias=False)
        self.bn1 = norm(inner)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _convolution(inner, width, 1, 1, deformable)
        self.bn2 = norm(width)
        self.downsample = _projection(before, width, stride, norm)

    @property
    def last_norm(self) -> nn.Module:
        """The normalisation before the sum."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """N×before×H×W → N×width×H/stride×W/stride."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class Bottleneck(nn.Module):
    """1×1 to ``inner`` channels, 3×3 in groups, 1×1 to ``width``, plus the shortcut."""

    def __init__(
        self,
        before: int,
        inner: int,
        width: int,
        stride: int,
        norm: NormLayer,
        groups: int = 1,
        deformable: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, inner, 1, bias=False)
        self.bn1 = norm(inner)
        self.conv2 = _convolution(inner, inner, stride, groups, deformable)
        self.bn2 = norm(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(before, width, stride, norm)

    @property
    def last_norm(self) -> nn.Module:
        """The normalisation before the sum."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """N×before×H×W → N×width×H/stride×W/stride."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


def _convolution(inputs: int, outputs: int, stride: int, groups: int, deformable: bool) -> nn.Module:
    """A block's ``conv2``."""
    if deformable:
        return DeformableConv2d(inputs, outputs, stride, groups)
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)


def _projection(before: int, width: int, stride: int, norm: NormLayer) -> nn.Sequential | None:
    """The 1×1 convolution of a shortcut, where stride or widths ask for one (torchvision's rule)."""
    if stride == 1 and before == width:
        return None
    return nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), norm(width))


class ResNetBody(nn.Module):
    """Stem and four stages without pooling and classifier.

    The children are in the order of execution, as torchvision's ``IntermediateLayerGetter`` runs them by that order.
    zero_init_residual: each block starts as its shortcut (Goyal et al. 2017); ValueError with norms that cannot learn.
    """

    def __init__(self, arch: Arch, norm: NormLayer, zero_init_residual: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, arch.stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(arch.stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        before = (arch.stem, *arch.widths)
        self.layer1 = _stage(arch, 1, before[0], 1, norm)
        self.layer2 = _stage(arch, 2, before[1], 2, norm)
        self.layer3 = _stage(arch, 3, before[2], 2, norm)
        self.layer4 = _stage(arch, 4, before[3], 2, norm)
        _initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """N×3×H×W → stride (4, 8, 16, 32) to the stage's output, C2 to C5."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        outputs = {}
        for stride, stage in ((4, self.layer1), (8, self.layer2), (16, self.layer3), (32, self.layer4)):
            outputs[stride] = x = stage(x)
        return outputs


def _stage(arch: Arch, number: int, before: int, stride: int, norm: NormLayer) -> nn.Sequential:
    stage, deformable = arch.stages[number - 1], arch.is_deformable(number)
    blocks: list[nn.Module] = []
    for inner in stage.inner:
        if arch.block == "basic":
            blocks.append(BasicBlock(before, inner, stage.width, stride, norm, deformable))
        else:
            blocks.append(Bottleneck(before, inner, stage.width, stride, norm, arch.groups, deformable))
        before, stride = stage.width, 1
    return nn.Sequential(*blocks)


def _initialise(body: ResNetBody, zero_init_residual: bool) -> None:
    """He et al. 2015, fan-out, as torchvision; normalisation layers start at scale 1 and shift 0 by themselves.

    Offsets of deformable convolutions have started at zero.
    """
    offsets = {module.conv_offset for module in body.modules() if isinstance(module, DeformableConv2d)}
    for module in body.modules():
        if isinstance(module, nn.Conv2d) and module not in offsets:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
            scale = module.last_norm.weight
            if not isinstance(scale, nn.Parameter):
                raise ValueError(
                    "a block whose last norm is frozen at 0 never learns; use norm 'batch' to start at zero"
                )
            nn.init.zeros_(scale)
