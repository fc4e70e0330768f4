"""Changes without new weights, and norms that are thawed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from detector_cases import assert_same_detections, batch, families, small_spec, stirred

from autodet.detectors import build, detect
from autodet.morphism.morph import MorphError
from autodet.morphism.settings import keep_proposals, resize, thaw_norms


@families
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_thawed_norms_detect_the_same_and_learn(family: str, eps: float) -> None:
    parent = stirred(small_spec(family, norm="frozen", norm_eps=eps))
    images, _ = batch()
    morph = thaw_norms(parent.spec, parent.model.state_dict(), random.Random(0))
    child = build(morph.spec)
    child.model.load_state_dict(morph.weights(parent.model.state_dict()))
    child.model.eval()
    parent.model.eval()
    assert_same_detections(detect(child, images), detect(parent, images))
    scale = "backbone.body.layer2.0.bn1.weight"
    assert scale in dict(child.model.named_parameters()) and scale not in dict(parent.model.named_parameters())
    with pytest.raises(MorphError, match="learn already"):
        thaw_norms(child.spec, child.model.state_dict(), random.Random(0))


@families
def test_another_input_size_keeps_every_weight(family: str) -> None:
    parent = stirred(small_spec(family))
    state = parent.model.state_dict()
    morph = resize(parent.spec, state, random.Random(0), 48)
    assert morph.spec == parent.spec.at_size(48)
    assert all(torch.equal(value, state[name]) for name, value in morph.weights(state).items())
    for pixels in (64, 0):
        with pytest.raises(MorphError, match="another size than 64"):
            resize(parent.spec, state, random.Random(0), pixels)


def test_fewer_proposals_are_a_setting() -> None:
    parent = stirred(small_spec("faster_rcnn"))
    state = parent.model.state_dict()
    morph = keep_proposals(parent.spec, state, random.Random(0), 7)
    assert morph.spec == replace(parent.spec, proposals=(60, 7), proposals_before_nms=(90, 7))
    child = build(morph.spec)
    child.model.load_state_dict(morph.weights(state))
    child.model.eval()
    seen: list[int] = []
    pool = child.model.get_submodule("roi_heads.box_roi_pool")
    pool.register_forward_pre_hook(lambda _, arguments: seen.extend(len(boxes) for boxes in arguments[1]))
    detect(child, batch()[0])
    assert len(seen) == 3 and 0 < max(seen) <= 7
    with pytest.raises(MorphError, match="no second stage"):
        keep_proposals(small_spec("fcos"), {}, random.Random(0), 7)
    with pytest.raises(MorphError, match="another number than 50"):
        keep_proposals(parent.spec, state, random.Random(0), 50)
