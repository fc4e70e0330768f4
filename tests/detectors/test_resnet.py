"""ResNetBody: equal to torchvision's ResNets in names and outputs, and free where theirs are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from autodet.detectors.arch import Arch
from autodet.detectors.resnet import ResNetBody, norm_layer

SMALL = Arch.parse("basic-8:8x2(8,12)-16x1-24x2(4)-32x1")


def fill(module: nn.Module, seed: int = 0) -> None:
    """Random weights that keep activations in range, and norm statistics that are not those of initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.dim() == 4:
            bound = (3 / (tensor.shape[1] * tensor.shape[2] * tensor.shape[3])) ** 0.5
            tensor.uniform_(-bound, bound, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            tensor.uniform_(-0.3, 0.3, generator=generator)
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator)


def torchvision_model(name: str, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """The model without the time that its own initialisation takes."""
    with torch.device("meta"):
        model: nn.Module = torchvision.models.get_model(name, norm_layer=norm, num_classes=1)
    model.to_empty(device="cpu")
    fill(model)
    return model.eval()


def body_with(arch: Arch, state: dict[str, Tensor], norm: Callable[[int], nn.Module]) -> ResNetBody:
    with torch.device("meta"):
        body = ResNetBody(arch, norm)
    body.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")}, strict=True, assign=True)
    return body.eval()


@pytest.mark.parametrize(
    ("name", "arch", "size"),
    [
        ("resnet18", Arch.resnet18(), (70, 94)),
        ("resnet34", Arch.resnet34(), (64, 64)),
        ("resnet50", Arch.resnet50(), (70, 94)),
        ("resnet101", Arch.resnet101(), (64, 64)),
        ("resnext50_32x4d", Arch.resnext50_32x4d(), (64, 64)),
        ("resnext101_32x8d", Arch.resnext101_32x8d(), (64, 64)),
        ("wide_resnet50_2", Arch.wide_resnet50_2(), (64, 64)),
    ],
)
def test_outputs_equal_torchvisions(name: str, arch: Arch, size: tuple[int, int]) -> None:
    reference = torchvision_model(name)
    body = body_with(arch, reference.state_dict(), norm_layer("batch"))
    assert [*body.state_dict()] == [key for key in reference.state_dict() if not key.startswith("fc.")]
    stages = IntermediateLayerGetter(reference, {f"layer{i}": str(i) for i in (1, 2, 3, 4)})
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = stages(images), body(images)
    assert [*found] == [4, 8, 16, 32]
    for stride, output in zip(found, expected.values(), strict=True):
        assert output.std() > 1e-3  # a dead network would be equal to anything
        torch.testing.assert_close(found[stride], output, rtol=1e-6, atol=1e-6)


def test_frozen_norms_with_eps_0_equal_torchvisions() -> None:
    reference = torchvision_model("resnet18", FrozenBatchNorm2d)
    for module in reference.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    body = body_with(Arch.resnet18(), reference.state_dict(), norm_layer("frozen", 0.0))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = IntermediateLayerGetter(reference, {"layer4": "out"})(images)["out"]
        torch.testing.assert_close(body(images)[32], expected, rtol=1e-6, atol=1e-6)


def test_detector_keys_equal_torchvisions() -> None:
    reference = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5
    )
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    body = ResNetBody(Arch.resnet18(), norm_layer("frozen"))
    ours = BackboneWithFPN(body, layers, list(Arch.resnet18().widths), 256)
    expected = {key: value.shape for key, value in reference.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    ours.load_state_dict(reference.state_dict(), strict=True)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for name, level in reference(images).items():
            torch.testing.assert_close(ours(images)[name], level)


def test_free_inner_widths() -> None:
    body = ResNetBody(SMALL, norm_layer("batch"))
    outputs = body(torch.rand(2, 3, 64, 96))
    assert {stride: tuple(output.shape) for stride, output in outputs.items()} == {
        4: (2, 8, 16, 24),
        8: (2, 16, 8, 12),
        16: (2, 24, 4, 6),
        32: (2, 32, 2, 3),
    }
    assert body.state_dict()["layer1.1.conv1.weight"].shape == (12, 8, 3, 3)
    assert Arch.of_state_dict(body.state_dict()) == SMALL
    sum(output.sum() for output in outputs.values()).backward()
    assert all(parameter.grad is not None for parameter in body.parameters())


@pytest.mark.parametrize(
    ("text", "projected"), [("basic-8:8x1", False), ("basic-8:16x1", True), ("bottleneck-8:8x1", False)]
)
def test_stage_1_projects_only_where_widths_differ(text: str, projected: bool) -> None:
    body = ResNetBody(Arch.parse(f"{text}-16x1-32x1-64x1"), norm_layer("batch"))
    assert any(key.startswith("layer1.0.downsample") for key in body.state_dict()) == projected


@pytest.mark.parametrize("text", [str(SMALL), "bottleneck-8:16x2-32x1-32x2-64x1"])
def test_zero_init_makes_blocks_their_shortcut(text: str) -> None:
    body = ResNetBody(Arch.parse(text), norm_layer("batch"), zero_init_residual=True).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        stage = body.layer1
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        first, second = stage[0](x), stage[1](stage[0](x))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    with pytest.raises(ValueError, match="never learns"):
        ResNetBody(Arch.parse(text), norm_layer("frozen"), zero_init_residual=True)


def test_initialisation_follows_fan_out() -> None:
    torch.manual_seed(0)
    body = ResNetBody(Arch.resnet18().scaled(0.5), norm_layer("batch"))
    weight = body.state_dict()["layer4.1.conv2.weight"]
    expected = (2 / (weight.shape[0] * 9)) ** 0.5
    assert float(weight.std()) == pytest.approx(expected, rel=0.02)


def test_norm_layer() -> None:
    batch, frozen = norm_layer("batch", 1e-3)(4), norm_layer("frozen", 0.0)(4)
    assert isinstance(batch, nn.BatchNorm2d) and batch.eps == 1e-3
    assert isinstance(frozen, FrozenBatchNorm2d) and frozen.eps == 0.0 and not list(frozen.parameters())
    with pytest.raises(ValueError, match="found 'group'"):
        norm_layer("group")
