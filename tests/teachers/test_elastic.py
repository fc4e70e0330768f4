"""Members of an elastic detector: equal to plain detectors, on weights and gradients that they share."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from detector_cases import LABELS, assert_same_detections, batch, families, small_spec, step_losses, steps
from pool_cases import SPACES, largest_detector, space_of
from torch import Tensor

from autodet.detectors import Detector, adapt, build, detect
from autodet.detectors.channels import channel_counts, channel_groups
from autodet.detectors.dims import group_of, size_of
from autodet.detectors.spec import FAMILIES
from autodet.teachers.elastic import KEPT, ElasticDetector
from autodet.teachers.space import Member, PoolSpace, SpaceError

# Every family on one space, and every space with one family.
CASES = [(family, "tied") for family in FAMILIES] + [("retinanet", name) for name in SPACES if name != "tied"]
every = pytest.mark.parametrize(("family", "name"), CASES)


def some_members(space: PoolSpace, count: int = 3) -> list[Member]:
    rng = random.Random(0)
    return [space.largest, space.smallest, *(space.sample(rng) for _ in range(count))]


@every
def test_an_activated_member_equals_the_extracted_one(family: str, name: str) -> None:
    space = space_of(name)
    elastic = ElasticDetector(largest_detector(family, space), space)
    images, _ = batch()
    for member in some_members(space):
        active, plain = elastic.activate(member), elastic.extract(member)
        assert active.spec == plain.spec and active.spec.body == member.body
        for one, other in zip(detect(active, images), detect(plain, images), strict=True):
            for key in one:
                torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)


@every
def test_a_member_equals_a_plain_detector_with_weights_cut_by_hand(family: str, name: str) -> None:
    """Independent of the table of channel groups: every tensor's leading corner, by the shapes of a fresh detector."""
    space = space_of(name)
    elastic = ElasticDetector(largest_detector(family, space), space)
    state = elastic.detector.model.state_dict()
    for member in some_members(space):
        plain = build(elastic.spec_of(member))
        cut = {
            key: state[key][tuple(slice(0, size) for size in own.shape)]
            for key, own in plain.model.state_dict().items()
        }
        plain.model.load_state_dict(cut)
        extracted = elastic.extract(member).model.state_dict()
        assert extracted.keys() == cut.keys()
        assert all(torch.equal(extracted[key], cut[key]) for key in cut)


@families
def test_the_largest_member_is_the_detector_itself(family: str) -> None:
    space = space_of("tied")
    detector = largest_detector(family, space)
    images, _ = batch()
    before = detect(copy.deepcopy(detector), images)
    elastic = ElasticDetector(detector, space)
    assert elastic.activate(space.largest) is detector
    assert_same_detections(detect(elastic.extract(space.largest), images), before)


@every
def test_a_members_gradient_is_the_plain_detectors_in_its_slices_and_zero_elsewhere(family: str, name: str) -> None:
    space = space_of(name)
    elastic = ElasticDetector(largest_detector(family, space), space)
    images, targets = batch()
    for member in some_members(space, 2):
        elastic.gradient.zero_()
        plain = elastic.extract(member)
        for detector in (elastic.activate(member), plain):
            detector.model.train()
            torch.manual_seed(3)
            sum(step_losses(detector, images, targets).values(), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
        total = 0.0
        shared = dict(elastic.detector.model.named_parameters())
        for key, parameter in plain.model.named_parameters():
            if parameter.grad is not None:
                found = shared[key].grad
                assert found is not None
                corner = found[tuple(slice(0, size) for size in parameter.shape)]
                torch.testing.assert_close(corner, parameter.grad, rtol=1e-4, atol=1e-5)
                total += float(parameter.grad.abs().sum())
        assert float(elastic.gradient.abs().sum()) == pytest.approx(total, rel=1e-4) and total > 0


def test_gradients_of_members_add_up_in_one_vector() -> None:
    space = space_of("tied")
    elastic = ElasticDetector(largest_detector("fcos", space), space)
    images, targets = batch()
    alone = []
    for member in some_members(space, 1):
        elastic.gradient.zero_()
        sum(step_losses(elastic.activate(member), images, targets).values(), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
        alone.append(elastic.gradient.clone())
    elastic.gradient.zero_()
    for member in some_members(space, 1):
        sum(step_losses(elastic.activate(member), images, targets).values(), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(elastic.gradient, torch.stack(alone).sum(0), rtol=1e-5, atol=1e-6)


def test_an_activated_member_sees_every_change_of_the_shared_weights() -> None:
    space = space_of("tied")
    elastic = ElasticDetector(largest_detector("fcos", space), space)
    member = elastic.activate(space.smallest)
    images, _ = batch()
    before = {stride: level.clone() for stride, level in features(member, images).items()}
    with torch.no_grad():
        for parameter in elastic.detector.model.parameters():
            parameter.mul_(1.1)
    after = features(elastic.activate(space.smallest), images)
    assert all(not torch.allclose(after[stride], before[stride]) for stride in before)
    extracted = features(elastic.extract(space.smallest), images)
    assert all(torch.allclose(after[stride], extracted[stride], atol=1e-6) for stride in before)


def features(detector: Detector, images: list[Tensor]) -> dict[int, Tensor]:
    detector.model.eval()
    with torch.no_grad():
        return steps(detector, images)[1]


def test_an_extracted_member_shares_nothing() -> None:
    space = space_of("tied")
    elastic = ElasticDetector(largest_detector("faster_rcnn", space), space)
    before = {key: value.clone() for key, value in elastic.detector.model.state_dict().items()}
    plain = elastic.extract(space.smallest)
    with torch.no_grad():
        for tensor in plain.model.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(value, before[key]) for key, value in elastic.detector.model.state_dict().items())
    assert adapt(plain.model, LABELS).spec == plain.spec


def test_a_members_statistics_are_its_own() -> None:
    space = space_of("tied")
    elastic = ElasticDetector(largest_detector("fcos", space), space)
    before = {key: value.clone() for key, value in elastic.detector.model.named_buffers()}
    member = elastic.activate(space.smallest)
    member.model.train()
    images, _ = batch()
    steps(member, images)
    assert all(torch.equal(value, before[key]) for key, value in elastic.detector.model.named_buffers())
    assert any(not torch.equal(v, before[k][: len(v)]) for k, v in member.model.named_buffers() if v.dim())


def test_more_members_than_are_kept_at_hand_are_still_right() -> None:
    space = space_of("tied")
    elastic = ElasticDetector(largest_detector("fcos", space), space)
    members = list(dict.fromkeys(space.sample(random.Random(seed)) for seed in range(60)))
    assert len(members) > KEPT + 5
    for member in [*members, *members[:3]]:
        detector = elastic.activate(member)
        assert detector.spec.body == member.body
        weights = detector.model.get_parameter("backbone.body.layer2.0.conv1.weight")
        shared = elastic.detector.model.get_parameter("backbone.body.layer2.0.conv1.weight")
        assert weights.data_ptr() == shared.data_ptr()


@families
def test_another_input_size_keeps_the_proportions_of_the_anchors(family: str) -> None:
    space = space_of("tied")
    elastic = ElasticDetector(largest_detector(family, space), space)
    small = elastic.activate(replace(space.largest, size=48))
    assert small.spec == replace(elastic.detector.spec.at_size(48), body=space.largest.body)
    images, targets = batch()
    small.model.train()
    assert all(torch.isfinite(loss) for loss in step_losses(small, images, targets).values())


def test_a_detector_that_is_not_the_largest_member_is_refused() -> None:
    space = space_of("tied")
    with pytest.raises(SpaceError, match="Expected a detector with the space's largest body"):
        ElasticDetector(build(small_spec("fcos")), space)
    with pytest.raises(SpaceError, match="frozen norms have none"):
        ElasticDetector(largest_detector("fcos", space, norm="frozen"), space)
    elastic = ElasticDetector(largest_detector("fcos", space), space)
    with pytest.raises(SpaceError, match="is no member of the pool"):
        elastic.activate(replace(space.largest, size=65))


@every
def test_the_groups_fit_every_tensor_of_the_body_and_what_reads_it(family: str, name: str) -> None:
    """A channel group has one size wherever it occurs, and every tensor whose shape depends on a width is listed."""
    space = space_of(name)
    detector = largest_detector(family, space)
    groups, counts = channel_groups(detector.spec), channel_counts(detector.spec)
    state = detector.model.state_dict()
    for key, dims in groups.items():
        sizes = [None if dim is None else counts[group_of(dim)] * size_of(dim) for dim in dims]
        assert all(size in (None, found) for size, found in zip(sizes, state[key].shape, strict=False)), key
    smaller = replace(detector.spec, body=space.smallest.body, neck_width=8, head_width=24)
    for key, tensor in build(smaller).model.state_dict().items():
        changed = [dim for dim, size in enumerate(tensor.shape) if size != state[key].shape[dim]]
        assert all(groups[key][dim] is not None for dim in changed), key


def test_a_body_that_feeds_the_levels_above_is_sliced_there_too() -> None:
    wider = PoolSpace.parse("basic-4..8/4:16x1..2-16..24/8x1..2-16x1(8..16/8)-24..32/8x1@64")
    detector = largest_detector("retinanet", wider, top="body")
    member = ElasticDetector(detector, wider).extract(wider.smallest)
    assert member.model.get_parameter("backbone.fpn.extra_blocks.p6.weight").shape[1] == 24
