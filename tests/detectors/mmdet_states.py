"""mmdetection's state dicts, made up from the names and shapes of its modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
NECK, CLASSES, BINS, HEAD = 32, 2, 3, 24
WIDTHS = (16, 24, 32, 40)  # outputs of a narrow bottleneck body's stages


def layer(state: State, name: str, *shape: int, bias: bool = True) -> None:
    state[f"{name}.weight"] = torch.randn(shape) * (2 / math.prod(shape[1:])) ** 0.5
    if bias:
        state[f"{name}.bias"] = torch.randn(shape[0]) * 0.1


def norm(state: State, name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(width) + 0.5, torch.randn(width) * 0.1
    state[f"{name}.running_mean"], state[f"{name}.running_var"] = torch.randn(width) * 0.1, torch.rand(width) + 0.5
    state[f"{name}.num_batches_tracked"] = torch.tensor(0)


def body(groups: int = 1) -> State:
    """A ResNet of one bottleneck a stage, or a ResNeXt, in mmdetection's names."""
    state: State = {}
    layer(state, "backbone.conv1", 8, 3, 7, 7, bias=False)
    norm(state, "backbone.bn1", 8)
    before = 8
    for stage, width in enumerate(WIDTHS, start=1):
        block = f"backbone.layer{stage}.0."
        for number, shape in enumerate([(8, before, 1, 1), (8, 8 // groups, 3, 3), (width, 8, 1, 1)], start=1):
            layer(state, f"{block}conv{number}", *shape, bias=False)
            norm(state, f"{block}bn{number}", shape[0])
        layer(state, f"{block}downsample.0", width, before, 1, 1, bias=False)
        norm(state, f"{block}downsample.1", width)
        before = width
    return state


def neck(first: int, above: int = 0, on_input: bool = True, groups: bool = False) -> State:
    """A pyramid on the stages from ``first``, from 0, with convolutions above; groups: norms on all of them."""
    state: State = {}
    for index, width in enumerate(WIDTHS[first:]):
        layer(state, f"neck.lateral_convs.{index}.conv", NECK, width, 1, 1, bias=not groups)
        layer(state, f"neck.fpn_convs.{index}.conv", NECK, NECK, 3, 3, bias=not groups)
    for index in range(above):
        inputs = WIDTHS[-1] if on_input and index == 0 else NECK
        layer(state, f"neck.fpn_convs.{4 - first + index}.conv", NECK, inputs, 3, 3, bias=not groups)
    for name in [name for name in state if groups and name.endswith(".conv.weight")]:
        layer(state, name.replace(".conv.weight", ".gn"), NECK)
    return state


def rpn() -> State:
    state: State = {}
    layer(state, "rpn_head.rpn_conv", NECK, NECK, 3, 3)
    layer(state, "rpn_head.rpn_cls", 3, NECK, 1, 1)
    layer(state, "rpn_head.rpn_reg", 12, NECK, 1, 1)
    return state


def box_head(name: str, regressions: int) -> State:
    state: State = {}
    layer(state, f"{name}.fc_cls", CLASSES + 1, HEAD)
    layer(state, f"{name}.fc_reg", regressions, HEAD)
    layer(state, f"{name}.shared_fcs.0", HEAD, NECK * BINS**2)
    layer(state, f"{name}.shared_fcs.1", HEAD, HEAD)
    return state


def faster_rcnn(regressions: int = 4 * CLASSES, **options: Any) -> State:
    return body(**options) | neck(0) | rpn() | box_head("roi_head.bbox_head", regressions)


def cascade_rcnn() -> State:
    state = body() | neck(0) | rpn()
    for stage in range(3):
        state |= box_head(f"roi_head.bbox_head.{stage}", 4)
    return state


def mask_head(name: str) -> State:
    state: State = {}
    layer(state, f"{name}.convs.0.conv", 12, NECK, 3, 3)
    layer(state, f"{name}.convs.1.conv", 12, 12, 3, 3)
    layer(state, f"{name}.upsample", 12, 12, 2, 2)
    layer(state, f"{name}.conv_logits", CLASSES, 12, 1, 1)
    return state


def mask_rcnn() -> State:
    return faster_rcnn() | mask_head("roi_head.mask_head")


def cascade_mask_rcnn() -> State:
    branches = [mask_head(f"roi_head.mask_head.{stage}") for stage in range(3)]
    return cascade_rcnn() | branches[0] | branches[1] | branches[2]


def retinanet(on_input: bool = True, groups: bool = False) -> State:
    state = body() | neck(1, above=2, on_input=on_input)
    for tower in ("cls", "reg"):
        for index in range(4):
            layer(state, f"bbox_head.{tower}_convs.{index}.conv", NECK, NECK, 3, 3, bias=not groups)
    layer(state, "bbox_head.retina_cls", 9 * CLASSES, NECK, 3, 3)
    layer(state, "bbox_head.retina_reg", 36, NECK, 3, 3)
    return state


def towers(depth: int, groups: bool) -> State:
    state: State = {}
    for tower in ("cls", "reg"):
        for index in range(depth):
            layer(state, f"bbox_head.{tower}_convs.{index}.conv", NECK, NECK, 3, 3, bias=not groups)
            if groups:
                layer(state, f"bbox_head.{tower}_convs.{index}.gn", NECK)
    return state


def gfl() -> State:
    state = body() | neck(1, above=2, on_input=False) | towers(4, groups=True)
    layer(state, "bbox_head.gfl_cls", CLASSES, NECK, 3, 3)
    layer(state, "bbox_head.gfl_reg", 4 * 17, NECK, 3, 3)
    state |= {f"bbox_head.scales.{level}.scale": torch.rand(()) + 0.5 for level in range(5)}
    return state | {"bbox_head.integral.project": torch.linspace(0, 16, 17)}


def reppoints(groups: bool = True, neck_groups: bool = False) -> State:
    state = body() | neck(1, above=2, groups=neck_groups) | towers(3, groups)
    for name in ("cls", "pts_refine"):
        layer(state, f"bbox_head.reppoints_{name}_conv", NECK, NECK, 3, 3, bias=False)
    layer(state, "bbox_head.reppoints_pts_init_conv", NECK, NECK, 3, 3)
    for name, width in (("cls", CLASSES), ("pts_init", 18), ("pts_refine", 18)):
        layer(state, f"bbox_head.reppoints_{name}_out", width, NECK, 1, 1)
    return state | {"bbox_head.moment_transfer": torch.tensor([0.3, -0.2])}


def fcos() -> State:
    state = body() | neck(1, above=2, on_input=False)
    for name, width in (("cls", CLASSES), ("reg", 4), ("centerness", 1)):
        layer(state, f"bbox_head.conv_{name}", width, NECK, 3, 3)
    return state | {f"bbox_head.scales.{level}.scale": torch.rand(()) + 0.5 for level in range(5)}
