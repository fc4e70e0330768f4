"""Teacher outputs as values: computed once per batch, kept on disk where batches recur, given to any student."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from autodet.atomic import atomic_write_bytes
from autodet.data import Batch
from autodet.detectors import Detector, DetectorOutput, Regions
from autodet.detectors.weights import weights_hash
from autodet.distill.formula import INPUTS
from autodet.distill.inputs import resized_boxes

PROPOSALS = 64  # the teacher's best proposals per image on which both box heads are compared [ours]


class Teacher:
    """A frozen detector that answers for batches.

    inputs: knowledge inputs that will be asked for; nothing else is computed (backbone and neck only for ``global``).
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
        self._identity = [weights, json.dumps(detector.spec.to_json(), sort_keys=True), content, PROPOSALS]

    def asked_for(self, inputs: Iterable[str]) -> Teacher:
        """The same teacher, asked for less or more."""
        other = copy.copy(self)
        other.inputs = frozenset(inputs)
        return other

    def __call__(self, batch: Batch) -> DetectorOutput:
        """The teacher's outputs on a batch, without gradient, on its device; proposals in the batch's pixels."""
        if self.directory is None:
            return self._compute(batch, self.inputs)
        path = self.directory / f"{self._key(batch)}.safetensors"
        if not path.exists():
            # All inputs at once: formulas differ in what they need, and the next one finds the file.
            answer = self._compute(batch, frozenset(INPUTS))
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, safetensors.torch.save(_pack(answer)))
        return _unpack(path, self.inputs, next(self.detector.model.parameters()).device)

    def _compute(self, batch: Batch, needs: frozenset[str]) -> DetectorOutput:
        device = next(self.detector.model.parameters()).device
        # Not inference_mode: its tensors cannot enter a loss that is differentiated. Always in the weights' own
        # precision: the answer outlives, in its file, the student that happened to ask first.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            inputs = self.detector.preprocess([image.to(device) for image in batch.images])
            features = self.detector.features(inputs)
            if not needs & {"logits.rpn", "logits.roi"}:
                return DetectorOutput(features)
            dense = self.detector.dense(inputs, features)
            if "logits.roi" not in needs:
                return DetectorOutput(features, dense.objectness)
            proposals = [boxes[:PROPOSALS] for boxes in self.detector.proposals(inputs, dense)]
            regions = self.detector.regions(inputs, features, proposals)
            # The student may see the image at another size.
            shared = resized_boxes(proposals, inputs.images.image_sizes, inputs.sizes)
            return DetectorOutput(features, dense.objectness, Regions(shared, regions.class_logits, regions.box_deltas))

    def _key(self, batch: Batch) -> str:
        return hashlib.sha256(json.dumps([*self._identity, str(batch.key)]).encode()).hexdigest()[:32]


def _pack(answer: DetectorOutput) -> dict[str, Tensor]:
    """Maps in half precision, boxes and the few class logits in full."""
    tensors = {f"features/{stride}": _half(level) for stride, level in answer.features.items()}
    tensors |= {f"objectness/{stride}": _half(level) for stride, level in (answer.objectness or {}).items()}
    if answer.regions is not None:
        tensors |= {f"proposals/{i:04d}": boxes for i, boxes in enumerate(answer.regions.proposals)}
        tensors |= {"class_logits": answer.regions.class_logits, "box_deltas": answer.regions.box_deltas}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _half(level: Tensor) -> Tensor:
    # float16 keeps 3 more bits than bfloat16; a value beyond its range keeps full precision instead of becoming inf.
    return level.half() if level.abs().max() < torch.finfo(torch.float16).max else level


def _unpack(path: Path, needs: frozenset[str], device: torch.device) -> DetectorOutput:
    """Only the tensors that are needed are read from the file."""
    with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
        names = list(file.keys())

        def levels(group: str) -> dict[int, Tensor]:
            found = [name for name in names if name.startswith(f"{group}/")]
            return {int(name.split("/")[1]): file.get_tensor(name) for name in found}

        features = levels("features") if "global" in needs else {}
        objectness = levels("objectness") if "logits.rpn" in needs else None
        regions = None
        if "logits.roi" in needs:
            proposals = [file.get_tensor(name) for name in sorted(names) if name.startswith("proposals/")]
            regions = Regions(proposals, file.get_tensor("class_logits"), file.get_tensor("box_deltas"))
    return DetectorOutput(features, objectness, regions)
