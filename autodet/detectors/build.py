"""From a spec to a detector, from a user's torchvision model to a detector, and both to and from one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from autodet.detectors.faster_rcnn import FasterRCNNSteps, build_faster_rcnn, describe_faster_rcnn
from autodet.detectors.spec import DetectorSpec, SpecError
from autodet.detectors.steps import Detector, Target
from autodet.detectors.weights import load_strict, load_weights, save_weights


def build(spec: DetectorSpec) -> FasterRCNNSteps:
    """A detector with fresh weights, drawn from torch's generator."""
    return FasterRCNNSteps(build_faster_rcnn(spec), spec)


def adapt(model: FasterRCNN, labels: Sequence[tuple[int, str]]) -> FasterRCNNSteps:
    """A user's torchvision model as a detector; labels: (category id, name) of its label 1, 2, …"""
    if not isinstance(model, FasterRCNN):
        raise SpecError(f"Expected a torchvision FasterRCNN, found {type(model).__name__}: no adapter for that family.")
    return FasterRCNNSteps(model, describe_faster_rcnn(model, labels))


def detect(detector: Detector, images: list[Tensor]) -> list[Target]:
    """Detections in evaluation mode: per image boxes R×4 xyxy (its pixels), scores, labels.

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


def save_detector(path: Path, detector: FasterRCNNSteps, notes: Mapping[str, Any] | None = None) -> None:
    """One safetensors file that rebuilds the detector: weights, spec, and free notes (JSON), written atomically."""
    save_weights(path, detector.model.state_dict(), {"spec": detector.spec.to_json(), "notes": dict(notes or {})})


def load_detector(path: Path) -> tuple[FasterRCNNSteps, dict[str, Any]]:
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
    return detector.eval(), dict(metadata.get("notes", {}))
