"""Teacher outputs as values: computed once per batch, kept on disk where batches recur, given to any student."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from autodet.atomic import atomic_write_bytes
from autodet.data import Batch
from autodet.detectors import Dense, Detector, DetectorSpec, Features, Inputs, TwoStage
from autodet.detectors.weights import weights_hash
from autodet.distill.inputs import parts_of
from autodet.distill.outputs import PARTS, DetectorOutput, RegionOutput, output_of, resized_boxes

FORMAT = 3  # of the stored answers
REGIONS = ("proposals", "class_logits", "region_corners")
GROUPS = {  # names in a stored answer, by the part that they belong to
    "features": ("features",),
    "dense": ("logits", "corners", "sides"),
    "regions": REGIONS,
    "masks": (*REGIONS, "masks"),
}
ON_REGIONS = frozenset({"regions", "masks"})  # parts that need proposals
PROPOSALS = 64  # the teacher's best proposals per image on which both box heads are compared [ours]


class Teacher:
    """A frozen detector that answers for batches.

    inputs: knowledge inputs that will be asked for; no step is run that none needs (``InputSpec.part``), or that the
    detector does not have.
    directory: keeps answers in 16 bits under a key of the teacher's weights, the batch and the image content; use it
    with a loader whose batches recur (``BatchPlan(fixed=True)``), otherwise it only fills the disk.
    """

    def __init__(
        self, detector: Detector, inputs: Iterable[str], directory: Path | None = None, content: str = ""
    ) -> None:
        self.detector = detector
        self.inputs = frozenset(inputs)
        self.directory = directory
        detector.model.eval()
        weights = weights_hash(detector.model.state_dict()) if directory is not None else ""
        self._identity = [weights, json.dumps(detector.spec.to_json(), sort_keys=True), content, PROPOSALS, FORMAT]

    def asked_for(self, inputs: Iterable[str]) -> Teacher:
        """The same teacher, asked for less or more."""
        other = copy.copy(self)
        other.inputs = frozenset(inputs)
        return other

    def __call__(self, batch: Batch) -> DetectorOutput:
        """The teacher's outputs on a batch, without gradient, on its device; proposals in the batch's pixels."""
        if self.directory is None:
            return self._compute(batch, self._parts())
        path = self.directory / f"{self._key(batch)}.safetensors"
        if not path.exists():
            # All inputs at once: formulas differ in what they need, and the next one finds the file.
            answer = self._compute(batch, parts_of_detector(self.detector.spec))
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, safetensors.torch.save(_pack(answer)))
        return self._unpack(path, batch)

    def _compute(self, batch: Batch, parts: frozenset[str]) -> DetectorOutput:
        detector = self.detector
        device = next(detector.model.parameters()).device
        # Not inference_mode: its tensors cannot enter a loss that is differentiated. Always in the weights' own
        # precision: the answer outlives, in its file, the student that happened to ask first.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            inputs = detector.preprocess([image.to(device) for image in batch.images])
            features = detector.features(inputs)
            dense = detector.dense(inputs, features) if parts - {"features"} else None
            return answer_of(detector, batch, inputs, features, dense, parts)

    def _unpack(self, path: Path, batch: Batch) -> DetectorOutput:
        """Only the tensors that are needed are read from the file; the ground truth is the batch's."""
        parts = self._parts()
        device = next(self.detector.model.parameters()).device
        tensors = _read(path, device, parts)
        canvas, *sizes = [(int(height), int(width)) for height, width in tensors["frame"]]
        truth = [target["boxes"].to(device) for target in batch.targets]
        boxes = resized_boxes(truth, [(int(image.shape[-2]), int(image.shape[-1])) for image in batch.images], sizes)
        output = DetectorOutput(self.detector.spec, _levels(tensors, "features"), canvas, sizes, boxes)
        if "dense" in parts:
            output.logits, output.corners = _levels(tensors, "logits"), _levels(tensors, "corners")
            output.sides = _levels(tensors, "sides") or None
        if parts & ON_REGIONS:
            proposals = [tensors[name] for name in sorted(tensors) if name.startswith("proposals/")]
            found = tensors["class_logits"], tensors["region_corners"], tensors.get("masks")
            output.regions = RegionOutput(proposals, *found)
        return output

    def _parts(self) -> frozenset[str]:
        return parts_of(self.inputs) & parts_of_detector(self.detector.spec)

    def _key(self, batch: Batch) -> str:
        return hashlib.sha256(json.dumps([*self._identity, str(batch.key)]).encode()).hexdigest()[:32]


def parts_of_detector(spec: DetectorSpec) -> frozenset[str]:
    """All that a detector can answer with, of ``outputs.PARTS``."""
    has = {"regions": spec.two_stage, "masks": spec.masks}
    return frozenset(part for part in PARTS if has.get(part, True))


def answer_of(
    detector: Detector, batch: Batch, inputs: Inputs, features: Features, dense: Dense | None, parts: frozenset[str]
) -> DetectorOutput:
    """A teacher's answer from its steps' values: the ``outputs.PARTS`` asked for, regions on its best proposals."""
    proposals = None
    if dense is not None and parts & ON_REGIONS:
        assert isinstance(detector, TwoStage)
        best = [boxes[:PROPOSALS] for boxes in detector.proposals(inputs, dense)]
        proposals = resized_boxes(best, inputs.images.image_sizes, inputs.sizes)  # a student may see another size
    masks_of: Literal["likeliest"] | None = "likeliest" if "masks" in parts else None
    answer = output_of(detector, batch, inputs, features, dense if "dense" in parts else None, proposals, masks_of)
    return answer if "features" in parts else replace(answer, features={})


def _pack(answer: DetectorOutput) -> dict[str, Tensor]:
    """Maps and masks in half precision, boxes and the few class logits in full."""
    tensors = {"frame": torch.tensor([answer.canvas, *answer.sizes])}
    maps = {"features": answer.features, "logits": answer.logits, "corners": answer.corners, "sides": answer.sides}
    for group, levels in maps.items():
        tensors |= {f"{group}/{stride}": _half(level) for stride, level in (levels or {}).items()}
    if answer.regions is not None:
        tensors |= {f"proposals/{i:04d}": boxes for i, boxes in enumerate(answer.regions.proposals)}
        tensors |= {"class_logits": answer.regions.class_logits, "region_corners": answer.regions.corners}
        tensors |= {} if answer.regions.masks is None else {"masks": _half(answer.regions.masks)}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _read(path: Path, device: torch.device, parts: frozenset[str]) -> dict[str, Tensor]:
    """The frame and what belongs to the parts, by the names that ``_pack`` gave."""
    groups = {"frame", *(group for part in parts for group in GROUPS[part])}
    with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.split("/")[0] in groups}  # noqa: SIM118


def _levels(tensors: dict[str, Tensor], group: str) -> dict[int, Tensor]:
    return {int(name.split("/")[1]): tensor for name, tensor in tensors.items() if name.startswith(f"{group}/")}


def _half(level: Tensor) -> Tensor:
    # float16 keeps 3 more bits than bfloat16; a value beyond its range keeps full precision instead of becoming inf.
    return level.half() if not level.numel() or level.abs().max() < torch.finfo(torch.float16).max else level
