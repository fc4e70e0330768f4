"""Deformable convolution (Dai et al. 2017, arXiv 1703.06211): a kernel whose every place is moved by an offset.

One deformable group, without the modulation of the second version. On a GPU it is torchvision's operator. On a CPU that
has no bfloat16 and no ONNX form, its multiply-adds are not counted, and with its gradient it takes 4 to 25 times as
long as what is done here instead: sampling by PyTorch's ``grid_sample``, then one matrix product, of the same values.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from autodet.detectors.arch import OFFSETS

KERNEL: Final = 3


def deformable_convolution(maps: Tensor, offsets: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """N×C×H×W → N×outputs×H'×W', H' and W' as of an ordinary convolution padded by half its k×k kernel.

    offsets: N×2k²×H'×W' in cells of ``maps``, of each place of the kernel, row by row, first down, then across; beyond
    the map there are zeros. weight: outputs × C/groups × k × k. Sampled in float32 at least, since half precision moves
    the places; the product is in the type that autocast wants, the result in that of ``maps``.
    """
    kind, exact = maps.dtype, torch.promote_types(maps.dtype, torch.float32)
    convolve = _by_torchvision if maps.is_cuda else _by_sampling
    return convolve(maps.to(exact), offsets.to(exact), weight.to(exact), stride).to(kind)


def _by_torchvision(maps: Tensor, offsets: Tensor, weight: Tensor, stride: int) -> Tensor:
    found: Tensor = deform_conv2d(maps, offsets, weight, None, (stride, stride), (weight.shape[-1] // 2,) * 2)
    return found


def _by_sampling(maps: Tensor, offsets: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The same as bilinear samples N×C×(k²·H')×W' and their product with the weights."""
    images, channels, (rows, columns) = maps.shape[0], weight.shape[1], offsets.shape[2:]
    down, across = _places(offsets, weight.shape[-1], stride)
    grid = torch.stack([(2 * across + 1) / maps.shape[3] - 1, (2 * down + 1) / maps.shape[2] - 1], dim=-1)
    samples = F.grid_sample(maps, grid.flatten(1, 2), mode="bilinear", padding_mode="zeros", align_corners=False)
    groups = maps.shape[1] // channels
    columns_of = samples.reshape(images, groups, channels * weight[0, 0].numel(), rows * columns)
    found = weight.reshape(groups, len(weight) // groups, -1) @ columns_of
    return found.reshape(images, len(weight), rows, columns)


def _places(offsets: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """Where each place of the kernel lies, N×k²×H'×W' cells down and across from the first cell's centre."""
    shape = (offsets.shape[0], kernel**2, 2, *offsets.shape[2:])
    moved_down, moved_across = offsets.reshape(shape).unbind(2)
    own = torch.arange(kernel, device=offsets.device, dtype=offsets.dtype) - kernel // 2
    rows, columns = (
        torch.arange(count, device=offsets.device, dtype=offsets.dtype) * stride for count in offsets.shape[2:]
    )
    down = own.repeat_interleave(kernel).view(-1, 1, 1) + rows.view(1, -1, 1)
    across = own.repeat(kernel).view(-1, 1, 1) + columns.view(1, 1, -1)
    return moved_down + down, moved_across + across


class DeformableConv2d(nn.Module):
    """A 3×3 convolution without bias that moves its kernel by offsets which a second convolution reads off its input.

    ``weight`` has the name and shape of the ordinary convolution's, which it begins as: the offsets start at zero.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, KERNEL, KERNEL))
        self.conv_offset = nn.Conv2d(inputs, OFFSETS, KERNEL, stride, padding=KERNEL // 2)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """N×inputs×H×W → N×outputs×H/stride×W/stride."""
        return deformable_convolution(x, self.conv_offset(x), self.weight, self.stride)
