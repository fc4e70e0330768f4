"""From a spec to a detector, from a user's torchvision model to a detector, and both to and from one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autodet.detectors import cascade_rcnn, faster_rcnn, fcos, gfl, mask_rcnn, reppoints, retinanet
from autodet.detectors.spec import FAMILIES, DetectorSpec, SpecError
from autodet.detectors.steps import Detector, Family, Target
from autodet.detectors.weights import load_strict, load_weights, metadata_of, save_weights

# A family whose models are also those of another, or whose weights hold the other's, comes first.
FAMILY_OF: Mapping[str, Family] = {
    "cascade_rcnn": cascade_rcnn.FAMILY,
    "mask_rcnn": mask_rcnn.FAMILY,
    "faster_rcnn": faster_rcnn.FAMILY,
    "gfl": gfl.FAMILY,
    "reppoints": reppoints.FAMILY,
    "retinanet": retinanet.FAMILY,
    "fcos": fcos.FAMILY,
}


def build(spec: DetectorSpec) -> Detector:
    """A detector with fresh weights, drawn from torch's generator."""
    family = FAMILY_OF[spec.family]
    return family.steps(family.build(spec), spec)


def steps_of(model: nn.Module, spec: DetectorSpec) -> Detector:
    """The steps around a plain model that fits the spec, such as averaged weights."""
    return FAMILY_OF[spec.family].steps(model, spec)


def adapt(model: nn.Module, labels: Sequence[tuple[int, str]]) -> Detector:
    """A user's torchvision model as a detector; labels: (category id, name) of its label 1, 2, …"""
    for family in FAMILY_OF.values():
        if isinstance(model, family.model):
            return family.steps(model, family.describe(model, labels))
    known = ", ".join(FAMILY_OF[name].model.__name__ for name in FAMILIES)
    raise SpecError(f"Expected a model among {known}, found {type(model).__name__}: no adapter for that family.")


def detect(detector: Detector, images: list[Tensor]) -> list[Target]:
    """Detections in evaluation mode: per image boxes R×4 xyxy (its pixels), scores, labels.

    Detectors with masks (``spec.masks``) give them too: R×1×H×W in 0–1, at the size of the image.

    Every module's mode is put back, also that of a norm kept in evaluation mode while the rest trains.
    """
    modes = {module: module.training for module in detector.model.modules()}
    detector.model.eval()
    try:
        with torch.no_grad():
            inputs = detector.preprocess(images)
            features = detector.features(inputs)
            return detector.postprocess(inputs, features, detector.dense(inputs, features))
    finally:
        for module, training in modes.items():
            module.training = training


def save_detector(path: Path, detector: Detector, notes: Mapping[str, Any] | None = None) -> None:
    """One safetensors file that rebuilds the detector: weights, spec, and free notes (JSON), written atomically."""
    save_weights(path, detector.model.state_dict(), {"spec": detector.spec.to_json(), "notes": dict(notes or {})})


def is_detector_file(path: Path | str) -> bool:
    """Whether a file was written by ``save_detector``, by its header alone; WeightsError where that cannot be read."""
    return "spec" in (metadata_of(path) or {})


def load_detector(path: Path | str) -> tuple[Detector, dict[str, Any]]:
    """The detector in evaluation mode and its notes; a clear error names the file where it is none of ours."""
    state, metadata = load_weights(path)
    if "spec" not in metadata:
        raise SpecError(
            f"{path} holds weights but no detector: its header has no spec. Expected a file of save_detector."
        )
    try:
        detector = build(DetectorSpec.from_json(metadata["spec"]))
    except (SpecError, ValueError) as error:
        raise SpecError(f"{path}: its spec {json.dumps(metadata['spec'])[:200]} cannot be built: {error}") from error
    load_strict(detector.model, state, str(path))
    detector.model.eval()
    return detector, dict(metadata.get("notes", {}))
