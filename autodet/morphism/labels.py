"""Other classes, or another order of them: what a data set needs of a detector that knows more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autodet.detectors import DetectorSpec
from autodet.detectors.build import FAMILY_OF
from autodet.morphism.morph import Morph, MorphError, Weights


def keep_labels(spec: DetectorSpec, weights: Weights, labels: Sequence[tuple[int, str]]) -> Morph:
    """The classes of these category ids alone, in this order and by these names; all other weights stay.

    What a class answers does not change; in a Faster R-CNN, whose classes compete, those that stay share the
    probability of those that go. MorphError for a category that the detector does not know.
    """
    unknown = [id for id, _ in labels if id not in spec.label_map]
    if unknown:
        raise MorphError(f"Expected categories among {list(spec.label_map)[:10]}, found {unknown[:5]}.")
    classes = torch.tensor([0, *(spec.label_map[id] for id, _ in labels)])  # 0 is the background
    fresh = {
        f"{layer}.{kind}": _rows(weights[f"{layer}.{kind}"], classes, len(spec.labels) + 1, each)
        for layer, each in FAMILY_OF[spec.family].class_layers_of(spec).items()
        for kind in ("weight", "bias")
    }
    return Morph(spec, spec.with_labels(labels), fresh=fresh)


def _rows(value: Tensor, classes: Tensor, known: int, each: int) -> Tensor:
    """Rows are anchors × classes × numbers of a class."""
    rest = value.shape[1:]
    return value.view(-1, known, each, *rest)[:, classes].reshape(-1, *rest)
