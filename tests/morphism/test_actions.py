"""Actions as values: they print, parse, suit the detector they are drawn for, and keep what they promise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from detector_cases import batch, families, small_spec, stirred

from autodet.detectors import Arch, Detector, build, detect
from autodet.morphism.actions import (
    ACTIONS,
    ALL,
    KEEP,
    Action,
    Steps,
    actions_text,
    are_exact,
    derive,
    draw_action,
    parse_actions,
)
from autodet.morphism.morph import MorphError
from autodet.morphism.settings import with_settings_of

STEPS = Steps(width=4, sizes=(48, 64), proposals=(5, 10), blocks=3)
BODY = Arch.parse("basic-16:16x2-16x2(12)-24x2-24x1")


def parent_of(family: str) -> Detector:
    return stirred(replace(small_spec(family), body=BODY))


def drawn(parent: Detector, names: Sequence[str], seeds: range) -> list[Action]:
    found = [draw_action(parent.spec, random.Random(seed), STEPS, names) for seed in seeds]
    return [action for action in found if action is not None]


@families
def test_every_kind_is_drawn_prints_and_parses(family: str) -> None:
    found = drawn(parent_of(family), ALL, range(300))
    spec = small_spec(family)
    impossible = {"remove_head_layer"} if spec.two_stage else {"prune_head", "keep_proposals"}
    expected = set(ALL) - impossible - (set() if spec.masks else {"prune_mask_head"})
    assert {action.name for action in found} == expected
    for action in found:
        assert Action.parse(str(action)) == action
    assert parse_actions(actions_text(found[:3])) == tuple(found[:3])
    assert parse_actions(KEEP) == () and actions_text(()) == KEEP


def test_what_only_detectors_with_masks_can_undergo_changes_no_other_ones_draws() -> None:
    spec, names = small_spec("faster_rcnn"), [name for name in ALL if name != "prune_mask_head"]
    for seed in range(20):
        one, other = (draw_action(spec, random.Random(seed), STEPS, each) for each in (ALL, names))
        assert one == other
    assert draw_action(spec, random.Random(0), STEPS, ["prune_mask_head"]) is None


def test_sizes_and_proposals_go_by_one_step() -> None:
    spec = small_spec("faster_rcnn")
    steps = Steps(sizes=(32, 48, 64, 80, 96), proposals=(5, 10, 20, 50, 100))
    for pixels, beside in ((64, {48, 80}), (96, {80}), (32, {48}), (70, {64, 80})):
        at = spec.at_size(pixels)
        actions = [draw_action(at, random.Random(seed), steps, ["resize"]) for seed in range(40)]
        assert {action.values[0] for action in actions if action is not None} == beside
    for count, beside in ((20, {10, 50}), (5, {10}), (200, {100})):
        at = replace(spec, proposals=(count, count))
        actions = [draw_action(at, random.Random(seed), steps, ["keep_proposals"]) for seed in range(40)]
        assert {action.values[0] for action in actions if action is not None} == beside


@families
def test_drawn_actions_give_detectors_that_detect(family: str) -> None:
    parent = parent_of(family)
    weights = parent.model.state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    done = set()
    for seed, action in enumerate(drawn(parent, ALL, range(12))):
        try:
            spec, state = derive([action], parent.spec, weights, random.Random(seed))
        except MorphError:
            continue
        child = build(spec)
        child.model.load_state_dict(state)
        assert spec != parent.spec
        assert len(detect(child, batch()[0][:1])) == 1
        done.add(action.name)
    assert len(done) >= 5
    assert all(torch.equal(weights[name], value) for name, value in before.items())


def test_a_child_is_the_same_from_the_same_seed() -> None:
    parent = parent_of("fcos")
    actions = parse_actions("add_block(stage=1) > widen_stage(stage=3, width=32) > resize(pixels=48)")
    first, second, other = (
        derive(actions, parent.spec, parent.model.state_dict(), random.Random(seed)) for seed in (1, 1, 2)
    )
    assert first[0] == second[0] == other[0]
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    assert any(not torch.equal(value, other[1][name]) for name, value in first[1].items())


def test_copied_channels_do_not_stay_equal() -> None:
    parent = parent_of("retinanet")
    action = Action("widen_inner", (2, 1, 24))
    weights = parent.model.state_dict()
    _, state = derive([action], parent.spec, weights, random.Random(0))
    filters = state["backbone.body.layer2.1.conv1.weight"].flatten(1)
    distances = torch.cdist(filters, filters) + torch.eye(len(filters)) * 9
    assert float(distances.min()) > 1e-4
    plain = ACTIONS[action.name].apply(parent.spec, weights, random.Random(0), *action.values).weights(weights)
    copies = plain["backbone.body.layer2.1.conv1.weight"].flatten(1)
    assert float((torch.cdist(copies, copies) + torch.eye(len(copies)) * 9).min()) < 1e-6


def test_only_what_leaves_features_alone_is_exact() -> None:
    assert are_exact(())
    assert are_exact(parse_actions("add_block(stage=1) > keep_proposals(count=5)"))
    assert not are_exact(parse_actions("add_block(stage=1) > resize(pixels=48)"))


def test_settings_are_those_that_a_user_could_set() -> None:
    base = parent_of("faster_rcnn").spec
    actions = parse_actions("prune_neck(width=12) > resize(pixels=48) > keep_proposals(count=5) > resize(pixels=64)")
    weights = stirred(base).model.state_dict()
    spec, _ = derive(actions, base, weights, random.Random(0))
    again = with_settings_of(base, spec)
    assert again.neck_width == base.neck_width and again.body == base.body
    for name in ("min_size", "max_size", "proposals", "proposals_before_nms"):
        assert getattr(again, name) == getattr(spec, name)
    assert again.anchor_sizes == base.anchor_sizes  # there and back they are rounded twice
    build(again).model.load_state_dict(weights)
    other = replace(parent_of("fcos").spec, min_size=48)
    assert with_settings_of(base, other) == base.at_size(48)
    assert with_settings_of(base, base) == base
    founder = replace(base, anchor_sizes=tuple(2 * size for size in base.anchor_sizes), max_size=2 * base.max_size)
    assert with_settings_of(base, replace(founder, proposals=(9, 7))) == replace(base, proposals=(base.proposals[0], 7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune_everything(width=3)", "Expected an action such as"),
        ("prune_stage(stage=2)", r"prune_stage\(stage=<number>, width=<number>\)"),
        ("prune_stage(stage=2, width=wide)", "wide"),
        ("prune_stage stage=2", "Expected an action such as"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(MorphError, match=message):
        parse_actions(text)
