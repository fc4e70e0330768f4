"""Deformable convolutions, alone and in bodies: torchvision's operator, closed forms, and all that reads a body."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detector_cases import assert_same_detections, batch, small_spec, stirred
from torch import Tensor
from torchvision.ops import deform_conv2d

from autodet.detectors import Arch, Detector, build, detect
from autodet.detectors.arch import ArchError
from autodet.detectors.deformable import DeformableConv2d, deformable_convolution
from autodet.detectors.resnet import ResNetBody, norm_layer
from autodet.evaluation import count_macs
from autodet.export import export_onnx
from autodet.morphism.blocks import add_block
from autodet.morphism.morph import Morph
from autodet.morphism.pruning import prune_inner, prune_stage
from autodet.morphism.widening import widen_inner, widen_stage
from autodet.teachers.elastic import ElasticDetector
from autodet.teachers.space import Member, PoolSpace

BODIES = {
    "basic[d2]-8:16x1-16x2(12)-24x2-24x1": (3, 4),
    "bottleneck[d1]-8:32x1-32x1-32x2(8)-32x2(8,12)": (4,),
    "bottleneck[g2,d4]-8:32x1(8)-32x1(8)-32x1(8)-32x2(8)": (1, 2, 3, 4),
}
bodies = pytest.mark.parametrize("text", BODIES)


# The operation. ---


def drawn(kernel: int, stride: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Maps of 2 images, offsets of which many lead beyond the map, and weights; all want a gradient."""
    cells = (-(-7 // stride), -(-9 // stride))
    values = (
        torch.randn(2, 4, 7, 9, dtype=dtype),
        4 * torch.randn(2, 2 * kernel**2, *cells, dtype=dtype),
        torch.randn(6, 4 // groups, kernel, kernel, dtype=dtype),
    )
    return [value.requires_grad_() for value in values]


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(3, 1, 1), (3, 2, 2), (5, 1, 2)])
def test_values_and_gradients_are_those_of_torchvisions_operator(kernel: int, stride: int, groups: int) -> None:
    maps, offsets, weight = leaves = drawn(kernel, stride, groups)
    found = deformable_convolution(maps, offsets, weight, stride)
    expected = deform_conv2d(maps, offsets, weight, stride=stride, padding=kernel // 2)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for own, other in zip(
        torch.autograd.grad(found, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(3, 1, 1), (3, 2, 2), (5, 1, 2)])
def test_without_offsets_it_is_the_ordinary_convolution(kernel: int, stride: int, groups: int) -> None:
    maps, offsets, weight = drawn(kernel, stride, groups)
    expected = F.conv2d(maps, weight, stride=stride, padding=kernel // 2, groups=groups)
    torch.testing.assert_close(deformable_convolution(maps, 0 * offsets, weight, stride), expected)


def test_offsets_are_down_then_across_and_between_cells_values_are_mixed() -> None:
    maps = torch.arange(20.0).view(1, 1, 4, 5)  # 5 a row and 1 a column
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 2] = 1.0  # the upper right place alone, the third of the kernel
    offsets = torch.zeros(1, 18, 4, 5)
    offsets[:, 4], offsets[:, 5] = 1.5, -0.25
    found = deformable_convolution(maps, offsets, weight)
    assert found[0, 0, 1, 1].item() == pytest.approx(maps[0, 0, 1, 1].item() + 5 * (1.5 - 1) + (1 - 0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    """As a model's own type, and by autocast, which leaves the weights in float32."""
    maps, offsets, weight = (value.detach() for value in drawn(3, 1, 2, torch.float32))
    expected = deformable_convolution(maps, offsets, weight)
    own = deformable_convolution(maps.to(dtype), offsets.to(dtype), weight.to(dtype))
    assert own.dtype == dtype
    exact = deformable_convolution(maps.to(dtype).float(), offsets.to(dtype).float(), weight.to(dtype).float())
    torch.testing.assert_close(own.float(), exact, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=dtype):
        rough = deformable_convolution(maps, offsets, weight)
    torch.testing.assert_close(rough, expected, rtol=0.05, atol=0.1)


def test_multiply_adds_are_an_ordinary_convolutions_however_it_is_computed() -> None:
    maps, offsets, weight = (value.detach() for value in drawn(3, 2, 2))
    expected = 2 * 6 * 4 * 5 * 2 * 9 / 1e9
    assert count_macs(deformable_convolution, maps, offsets, weight, 2) == pytest.approx(expected)
    assert count_macs(lambda: deform_conv2d(maps, offsets, weight, stride=2, padding=1)) == pytest.approx(expected)
    layer = DeformableConv2d(4, 6, stride=2, groups=2)
    of_offsets = 2 * 18 * 4 * 5 * 4 * 9 / 1e9
    assert count_macs(layer, maps.float()) == pytest.approx(expected + of_offsets)


# Bodies. ---


@bodies
def test_a_body_begins_as_the_plain_one_and_its_offsets_learn(text: str) -> None:
    arch = Arch.parse(text)
    plain, body = ResNetBody(replace(arch, deformable=0), norm_layer("batch")), ResNetBody(arch, norm_layer("batch"))
    missing, unexpected = body.load_state_dict(plain.state_dict(), strict=False)
    convolutions = [f"layer{n}.{i}.conv2" for n in BODIES[text] for i in range(arch.stages[n - 1].depth)]
    assert missing == [f"{name}.conv_offset.{part}" for name in convolutions for part in ("weight", "bias")]
    assert not unexpected
    images = torch.rand(2, 3, 64, 96)
    outputs = body(images)
    for stride, output in plain(images).items():
        torch.testing.assert_close(outputs[stride], output, rtol=1e-4, atol=1e-4)
    sum(output.square().sum() for output in outputs.values()).backward()
    for name in missing:
        gradient = body.get_parameter(name).grad
        assert gradient is not None and float(gradient.abs().sum()) > 0, name


@bodies
def test_a_body_is_read_off_its_state_dict(text: str) -> None:
    with torch.device("meta"):
        state = ResNetBody(Arch.parse(text), norm_layer("batch")).state_dict()
    assert Arch.of_state_dict(state) == Arch.parse(text)


def test_other_deformable_bodies_are_refused() -> None:
    with torch.device("meta"):
        state = ResNetBody(Arch.parse("basic[d2]-8:8x1-8x1-8x2-8x1"), norm_layer("batch")).state_dict()
    name = "layer4.0.conv2.conv_offset.weight"
    lacking = {key: value for key, value in state.items() if "layer4.0.conv2.conv_offset" not in key}
    with pytest.raises(ArchError, match=r"layer3.0 has a deformable convolution, but layer4.0 has none"):
        Arch.of_state_dict(lacking)
    modulated = state | {name: state[name].new_empty(27, 8, 3, 3)}
    with pytest.raises(ArchError, match=rf"'{name}' makes 27 numbers, expected 18: one deformable group without mod"):
        Arch.of_state_dict(modulated)


def test_scaling_keeps_what_is_deformable() -> None:
    assert str(Arch.parse("basic[d3]-64:64x2-128x2-256x2-512x2").scaled(0.25)) == "basic[d3]-16:16x2-32x2-64x2-128x2"


def test_files_of_the_first_version_have_no_deformable_stages() -> None:
    values = Arch.resnet18().to_json()
    assert values.pop("deformable") == 0
    assert Arch.from_json(values | {"version": 1}) == Arch.resnet18()
    with pytest.raises(ArchError, match="Expected the fields"):
        Arch.from_json(values)


@bodies
@pytest.mark.parametrize(
    ("action", "arguments"),
    [
        (prune_inner, (4, 0, 4)),
        (prune_stage, (3, 16)),
        (prune_stage, (4, 16)),
        (add_block, (4,)),
        (widen_inner, (4, 0, 28)),
        (widen_stage, (4, 40)),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(map(str, value)),
)
def test_actions_keep_their_promise(text: str, action: object, arguments: tuple[int, ...]) -> None:
    """Pruning equals masking, growing changes nothing; offsets that are not zero read the same channels."""
    parent = stirred(small_spec("retinanet", body=Arch.parse(text)))
    if parent.spec.body.groups > 1 and action in (prune_inner, widen_inner):
        pytest.skip("inner widths of grouped convolutions go together")
    parent.model.eval()
    state = parent.model.state_dict()
    morph = action(parent.spec, state, random.Random(0), *arguments)  # type: ignore[operator]
    assert isinstance(morph, Morph)
    child = build(morph.spec)
    child.model.load_state_dict(morph.weights(state))
    if action in (prune_inner, prune_stage):
        masked(parent.spec.body, state, morph)
    child.model.eval()
    assert_same_maps(child, parent)


def assert_same_maps(found: Detector, expected: Detector) -> None:
    """Of the pyramid: all that a body decides."""
    images, _ = batch()
    with torch.no_grad():
        ours, theirs = (detector.features(detector.preprocess(images)) for detector in (found, expected))
    for stride, level in theirs.items():
        assert level.std() > 1e-3
        torch.testing.assert_close(ours[stride], level, rtol=1e-4, atol=1e-5)


def masked(body: Arch, state: dict[str, Tensor], morph: Morph) -> None:
    """Silence, in place, the channels of the body that a morph leaves out, by the norms that make them."""
    for group, picks in morph.picks.items():
        last = "2" if body.block == "basic" else "3"
        for name, tensor in state.items():
            layer, _, norm = name.removeprefix("backbone.body.").rpartition(".")[0].rpartition(".")
            made_inside = f"{layer}.{norm.replace('bn', 'conv')}" == group
            made_by_stage = layer.split(".")[0] == group and (norm == f"bn{last}" or "downsample.1" in name)
            if (made_inside or made_by_stage) and name.rpartition(".")[2] in ("weight", "bias") and tensor.dim() == 1:
                gone = [channel for channel in range(len(tensor)) if channel not in picks.tolist()]
                tensor[gone] = 0


def test_members_of_a_deformable_pool_are_their_own_detectors() -> None:
    space = PoolSpace.parse("basic[d2]-=:8x1-8..16/8x1..2-8..16/8x1..2(4..12/4)-16x1@64")
    assert str(space) == "basic[d2]-=:8x1-8..16/8x1..2-8..16/8x1..2(4..12/4)-16x1@64"
    assert all(member.body.deformable == 2 for member in space.members())
    plain = Member(replace(space.smallest.body, deformable=0), 64)
    assert space.why_outside(plain) == "its last 0 stages are deformable, the pool's last 2"
    largest = stirred(replace(small_spec("fcos"), body=space.largest.body))
    elastic = ElasticDetector(largest, space)
    images, _ = batch()
    for member in (space.smallest, space.sample(random.Random(3))):
        active, extracted = elastic.activate(member), elastic.extract(member)
        assert_same_detections(detect(active, images), detect(extracted, images))
        whole = largest.model.get_parameter("backbone.body.layer4.0.conv2.conv_offset.weight")
        own = active.model.get_parameter("backbone.body.layer4.0.conv2.conv_offset.weight")
        assert torch.equal(own, whole[:, : own.shape[1]]) and own.abs().sum() > 0


def test_a_deformable_detector_is_exported(tmp_path: Path) -> None:
    detector = stirred(small_spec("fcos", body=Arch.parse("basic[d2]-8:8x1-16x1-16x1-24x1")))
    check = export_onnx(detector, tmp_path / "detector.onnx", [torch.rand(3, 64, 96), torch.rand(3, 60, 40)])
    assert check.images == 2 and check.detections > 50
