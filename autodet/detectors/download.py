"""Published weights of torchvision, downloaded through torch.hub into its cache and checked by hash."""

from __future__ import annotations

import pickle
from typing import Final

from torch import Tensor
from torchvision.models import get_model_weights

from autodet.detectors.weights import WeightsError, modern_names

IMAGENET_BODIES: Final = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
)
COCO_DETECTORS: Final = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")


def download_imagenet_body(name: str, version: str = "IMAGENET1K_V1") -> dict[str, Tensor]:
    """ImageNet weights of a torchvision ResNet without its classifier: a state dict of ``ResNetBody``.

    name: one of IMAGENET_BODIES; version: a member of torchvision's weights, V1 being what its detectors start from.
    Raises WeightsError for an unknown name or version, and where the download fails.
    """
    state = _download(name, version, IMAGENET_BODIES)
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def download_coco_detector(name: str = "fasterrcnn_resnet50_fpn", version: str = "COCO_V1") -> dict[str, Tensor]:
    """COCO weights of a torchvision detector under torchvision's present names.

    They belong to a detector with frozen norms of eps 0 and 90 labels that are COCO's raw category ids, ten of which
    name nothing: build it with norm "frozen", norm_eps 0.0 and these labels. Raises WeightsError as above.
    """
    return modern_names(_download(name, version, COCO_DETECTORS))


def _download(name: str, version: str, known: tuple[str, ...]) -> dict[str, Tensor]:
    if name not in known:
        raise WeightsError(f"expected one of {', '.join(known)}, found {name!r}")
    versions = get_model_weights(name)
    if version not in versions.__members__:
        raise WeightsError(f"{name}: expected one of the weights {', '.join(versions.__members__)}, found {version!r}")
    weights = versions[version]
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"{name}: {weights.url} could not be downloaded or read ({error}); check the connection, or put the file "
            "into the folder checkpoints of torch.hub's cache (TORCH_HOME) by hand"
        ) from error
    return dict(state)
