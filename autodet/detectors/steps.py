"""What every detector family offers: explicit steps in place of one mode-dependent ``forward``.

``preprocess → features → dense → (proposals → regions) → losses | postprocess``. Distillation reads what lies between
the steps, so each is a plain method with a value in and a value out. Nothing here trains or downloads. A new family is
one file with these steps and a ``Family`` of what else is particular to it, and its lines in ``build`` and ``traits``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from autodet.detectors.dims import Named
from autodet.detectors.spec import DetectorSpec
from autodet.detectors.state import MMDet, Read, State

Target = dict[
    str, Tensor
]  # boxes N×4 xyxy pixels, labels N in 1..K, image_id, orig_size (h, w), masks N×H×W where kept
Features = dict[int, Tensor]  # nominal stride (4, 8, 16, …) → N×C×H×W


@dataclass
class Inputs:
    """A batch after normalising, resizing, and padding to one canvas.

    images: ``tensors`` N×3×H×W and, per image, its size inside the canvas; sizes: (height, width) before resizing.
    """

    images: ImageList
    targets: list[Target] | None
    sizes: list[tuple[int, int]]

    def ground_truth(self) -> list[Target]:
        """The targets; ValueError where none were given."""
        if self.targets is None:
            raise ValueError("The losses need targets: give them to preprocess().")
        return self.targets


@dataclass
class Dense:
    """Responses at every location of every level; of a two-stage detector, those of its proposal network.

    A anchors stand at each location, the anchor being the outer and the class the inner index of the channels.
    logits: nominal stride → N×(A·K)×H×W, K = 1 (objectness) in a proposal network, labels + 1 in a one-stage head;
    deltas: nominal stride → N×4A×H×W in the family's own terms; anchors: per image, all × 4 xyxy, level by level, row
    by row; centerness: nominal stride → N×A×H×W where the family has it; sides: nominal stride → N×4B×H×W where it has
    distributions (and one anchor), the logits that a side of the box lies 0, 1, …, B − 1 strides from the location.
    """

    logits: dict[int, Tensor]
    deltas: dict[int, Tensor]
    anchors: list[Tensor]
    centerness: dict[int, Tensor] | None = None
    sides: dict[int, Tensor] | None = None


@dataclass
class Regions:
    """Second-stage responses on given proposals (R in all images together, label 0 is background).

    proposals: per image R_i×4 xyxy pixels; class_logits: R×(K+1), of which the softmax is the classes' probabilities;
    box_deltas: R×4(K+1), from the proposals, or from ``references`` (R_i×4 per image) where earlier heads moved these.
    """

    proposals: list[Tensor]
    class_logits: Tensor
    box_deltas: Tensor
    references: list[Tensor] | None = None


class Detector(Protocol):
    """A family's adapter around its plain model. ``model.state_dict()`` has the plain model's parameter names."""

    spec: DetectorSpec

    @property
    def model(self) -> nn.Module:
        """The plain model."""
        ...

    def preprocess(self, images: list[Tensor], targets: list[Target] | None = None) -> Inputs:
        """Images 3×h×w in [0, 1] (and targets in their pixels) → one padded batch."""
        ...

    def features(self, inputs: Inputs) -> Features:
        """The pyramid, nominal stride → N×C×H×W."""
        ...

    def dense(self, inputs: Inputs, features: Features) -> Dense:
        """The dense head's responses on the pyramid."""
        ...

    def boxes(self, dense: Dense) -> Tensor:
        """The boxes that the responses stand for, N×all×4 xyxy in the canvas's pixels, in the anchors' order."""
        ...

    def losses(self, inputs: Inputs, features: Features, dense: Dense) -> dict[str, Tensor]:
        """The plain model's own named training losses (scalars); samples against the targets from torch's generator."""
        ...

    def postprocess(self, inputs: Inputs, features: Features, dense: Dense) -> list[Target]:
        """Per image boxes (pixels of the images given to ``preprocess``), scores and labels after NMS."""
        ...


@runtime_checkable
class TwoStage(Detector, Protocol):
    """A detector whose second stage looks at regions."""

    def proposals(self, inputs: Inputs, dense: Dense) -> list[Tensor]:
        """Per image R_i×4 boxes, best first, without gradient."""
        ...

    def regions(self, inputs: Inputs, features: Features, proposals: list[Tensor]) -> Regions:
        """The second stage's responses on *given* proposals, so that two detectors can be asked about the same ones."""
        ...

    def region_corners(self, regions: Regions) -> Tensor:
        """The regions' boxes of every class, R×(K+1)×4 xyxy, in units of the given proposal from its centre."""
        ...


@runtime_checkable
class Masked(TwoStage, Protocol):
    """A detector whose second stage may also answer with masks; where its spec says so, ``postprocess`` gives N×1×H×W
    in 0–1 of each image."""

    def region_masks(self, inputs: Inputs, features: Features, proposals: list[Tensor]) -> Tensor:
        """Logits R×(K+1)×M×M of the masks of every class on *given* proposals, each over its box."""
        ...


@dataclass(frozen=True)
class Family:
    """What a family's file says of it to the others.

    model: the class of its plain models. steps: the adapter around one. build: a plain model with fresh weights from
    torch's generator. describe: the spec of a user's model whose labels are (category id, name); SpecError where a spec
    cannot say a part. read: what a state dict's head tells, None where it is another family's. head_groups: the head's
    tensors and whose channels their dimensions are; head_counts: channels of the groups that the head itself makes.
    class_layers: layers that answer for every class → how many numbers in a row are of one class; ``{}`` in a name
    stands for the number of a stage of box heads; mask_layers: further ones, of detectors with masks. mmdet: how
    mmdetection's weights of the family are read, if at all.
    """

    model: type[nn.Module]
    steps: Callable[[Any, DetectorSpec], Detector]
    build: Callable[[DetectorSpec], nn.Module]
    describe: Callable[[Any, Sequence[tuple[int, str]]], DetectorSpec]
    read: Callable[[State], Read | None]
    head_groups: Callable[[DetectorSpec], Named]
    head_counts: Callable[[DetectorSpec], dict[str, int]]
    class_layers: Mapping[str, int]
    mask_layers: Mapping[str, int] = field(default_factory=dict)
    mmdet: MMDet | None = None

    def class_layers_of(self, spec: DetectorSpec) -> dict[str, int]:
        """The class layers of one detector, by their whole names."""
        stages = range(max(1, len(spec.stage_ious)))
        layers = {**self.class_layers, **(self.mask_layers if spec.masks else {})}
        return {name.format(stage): each for name, each in layers.items() for stage in stages}
