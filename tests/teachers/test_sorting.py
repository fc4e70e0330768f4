"""Sorting channels: nothing that a detector computes changes, and the most important ones come first."""

from __future__ import annotations

import copy

import pytest
import torch
from detector_cases import assert_same_detections, batch, families, step_losses
from pool_cases import SPACES, largest_detector, space_of
from torch import Tensor, nn

from autodet.detectors import Detector, detect
from autodet.detectors.channels import body_counts, channel_counts, channel_groups
from autodet.detectors.dims import group_of, size_of
from autodet.morphism.importance import channel_importance, importance_order
from autodet.teachers.sorting import sort_channels

spaces = pytest.mark.parametrize("name", SPACES)


@families
@spaces
def test_sorting_leaves_detections_as_they_are(family: str, name: str) -> None:
    detector = largest_detector(family, space_of(name))
    images, _ = batch()
    before = detect(detector, images)
    state = {key: value.clone() for key, value in detector.model.state_dict().items()}
    sort_channels(detector.model, detector.spec, importance_order(detector.model.state_dict(), detector.spec))
    assert_same_detections(detect(detector, images), before)
    moved = [key for key, value in detector.model.state_dict().items() if not torch.equal(value, state[key])]
    assert len(moved) > 10


@families
@spaces
def test_after_sorting_importance_falls_in_every_group(family: str, name: str) -> None:
    detector = largest_detector(family, space_of(name))
    sort_channels(detector.model, detector.spec, importance_order(detector.model.state_dict(), detector.spec))
    importance = channel_importance(detector.model.state_dict(), detector.spec)
    counts = channel_counts(detector.spec)
    grouped = detector.spec.body.groups > 1  # there the inner channels keep their order
    assert importance.keys() == {group for group in counts if not (grouped and "conv" in group and "." in group)}
    for group, values in importance.items():
        assert len(values) == counts[group]
        assert (values[:-1] >= values[1:] * (1 - 1e-5)).all(), group


def test_importance_is_the_l1_norm_of_the_filter_behind_its_norm() -> None:
    detector = largest_detector("fcos", space_of("tied"))
    importance = channel_importance(detector.model.state_dict(), detector.spec)
    body = detector.model.get_submodule("backbone.body")

    def of(convolution: str, norm: str, channel: int) -> float:
        filters, layer = body.get_parameter(f"{convolution}.weight"), body.get_submodule(norm)
        assert isinstance(layer, nn.BatchNorm2d) and layer.running_var is not None
        deviation = float((layer.running_var[channel] + layer.eps) ** 0.5)
        return float((filters[channel].abs().sum() * layer.weight[channel].abs()).detach()) / deviation

    assert float(importance["layer2.1.conv1"][3]) == pytest.approx(of("layer2.1.conv1", "layer2.1.bn1", 3), rel=1e-5)
    outputs = [("layer2.0.conv2", "layer2.0.bn2"), ("layer2.0.downsample.0", "layer2.0.downsample.1")]
    outputs += [("layer2.1.conv2", "layer2.1.bn2"), ("layer2.2.conv2", "layer2.2.bn2")]
    assert float(importance["layer2"][5]) == pytest.approx(sum(of(*names, 5) for names in outputs), rel=1e-5)
    stem = [("conv1", "bn1"), ("layer1.0.conv2", "layer1.0.bn2"), ("layer1.1.conv2", "layer1.1.bn2")]
    assert float(importance["layer1"][0]) == pytest.approx(sum(of(*names, 0) for names in stem), rel=1e-5)


def test_equally_important_channels_keep_their_order() -> None:
    detector = largest_detector("fcos", space_of("tied"))
    state = {key: torch.ones_like(value) for key, value in detector.model.state_dict().items()}
    for group, order in importance_order(state, detector.spec).items():
        assert order.tolist() == list(range(len(order))), group


def trained(detector: Detector, optimizer: torch.optim.Optimizer, steps: int) -> None:
    images, targets = batch()
    doubled = [{"boxes": target["boxes"].double(), "labels": target["labels"]} for target in targets]
    detector.model.train()
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        losses = step_losses(detector, [image.double() for image in images], doubled)
        sum(losses.values(), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)])
def test_training_goes_on_as_if_nothing_had_been_sorted(make: type[torch.optim.AdamW]) -> None:
    """The optimiser's moments move along. In double precision: single rounding errors grow a million times here."""
    plain = largest_detector("fcos", space_of("bottleneck"))
    plain.model.double()
    sorted_ = copy.deepcopy(plain)
    for detector in (plain, sorted_):
        optimizer = make(detector.model.parameters())
        torch.manual_seed(0)
        trained(detector, optimizer, 2)
        if detector is sorted_:
            order = importance_order(detector.model.state_dict(), detector.spec)
            order = {group: order[group] for group in body_counts(detector.spec.body)}  # features are compared
            sort_channels(detector.model, detector.spec, order, optimizer)
        torch.manual_seed(1)
        trained(detector, optimizer, 3)
    images = [image.double() for image in batch()[0]]
    features = [d.features(d.preprocess(images)) for d in (plain, sorted_)]
    for stride in features[0]:
        torch.testing.assert_close(features[0][stride], features[1][stride], rtol=0, atol=1e-9)


def test_copies_are_sorted_in_the_same_order() -> None:
    detector = largest_detector("fcos", space_of("tied"))
    averaged = copy.deepcopy(detector.model)
    with torch.no_grad():
        for tensor in averaged.parameters():
            tensor.add_(0.01 * torch.randn_like(tensor))  # an order of its own would differ
    before = {key: value.clone() for key, value in averaged.state_dict().items()}
    order = importance_order(detector.model.state_dict(), detector.spec)
    sort_channels(detector.model, detector.spec, order, None, averaged)
    groups = channel_groups(detector.spec)
    after = averaged.state_dict()
    for key, tensor in before.items():
        expected: Tensor = tensor
        for dim, group in enumerate(groups.get(key, ())):
            if group is not None:
                size = size_of(group)
                places = [int(i) * size + place for i in order[group_of(group)] for place in range(size)]
                expected = torch.stack([expected.select(dim, i) for i in places], dim)
        assert torch.equal(after[key], expected), key
