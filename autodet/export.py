"""A detector as one ONNX file that runs without autodet and PyTorch, checked in ONNX Runtime before it is written.

The file takes one image of any size and does everything behind it: normalising, resizing, and the selection of
detections. It resizes without antialiasing; whoever wants an evaluation's detections gives it images that are resized
as ``data.ImageCache`` does. onnx and onnxruntime are needed here alone: ``pip install "autodet[onnx]"``.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.onnx import operators

from autodet.atomic import atomic_write_bytes
from autodet.detectors import Detector, DetectorSpec, SpecError, Target, detect

OPSET: Final = 17
OUTPUTS: Final = ("boxes", "scores", "labels")
MASKS: Final = "masks"  # a further output of detectors that give them
BOX_TOLERANCE: Final = 1e-4  # of the image's longer side
SCORE_TOLERANCE: Final = 1e-4
MASK_TOLERANCE: Final = 0.01  # of an object's pixels
MASKS_MOVED: Final = 0.05  # share of an image's masks that may differ by more
REMEDY: Final = (
    "nothing was written. Where a detection lies at a threshold, rounding decides, so try other images; "
    "if they differ, too, use another version of torch, onnx or onnxruntime"
)
ABOUT: Final = (
    "A detector by autodet. image: float32 3×height×width, RGB in [0, 1], of any size. boxes: float32 N×4, x1 y1 x2 y2 "
    "in pixels of that image; scores: float32 N in 0–1, best first; labels: int64 N, which metadata 'labels' explains."
)
ABOUT_MASKS: Final = " masks: float32 N×1×height×width, how likely each pixel of that image is the object's, in 0–1."


class ExportError(ValueError):
    """A detector that cannot be exported or whose ONNX file disagrees with it, or a file that is no such export."""


@dataclass(frozen=True)
class OnnxCheck:
    """What an exported file was compared on with ``detect``; with 0 detections nothing was.

    images, detections: that agree. box_difference: the largest of any corner's coordinate, in pixels; score_difference:
    the largest, in 0–1; mask_difference: the largest share of an object's pixels that are on one side of 0.5 here and
    on the other there. odd: images that do not agree.
    """

    images: int
    detections: int
    box_difference: float
    score_difference: float
    odd: int = 0
    mask_difference: float = 0.0


@dataclass(frozen=True)
class OnnxDetector:
    """An exported detector in ONNX Runtime, on the CPU."""

    spec: DetectorSpec
    session: Any

    def __call__(self, image: Tensor) -> Target:
        """Detections as ``detect`` gives them for one image, float32 3×H×W in [0, 1]."""
        names = outputs_of(self.spec)
        found = self.session.run(list(names), {"image": image.cpu().numpy()})
        return {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}


def outputs_of(spec: DetectorSpec) -> tuple[str, ...]:
    """What an exported file of a detector gives, by name."""
    return (*OUTPUTS, MASKS) if spec.masks else OUTPUTS


class _Plain(nn.Module):
    """The plain model as a function of one image, with a tuple to return, as the exporter wants it."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.model([image])[0]
        return tuple(found[name] for name in self.outputs)


def export_onnx(detector: Detector, path: Path, images: Sequence[Tensor], odd: int = 0) -> OnnxCheck:
    """Write ``detector`` to one ONNX file that finds in each of ``images`` what ``detect`` finds.

    images: float32 3×H×W in [0, 1], of any sizes, best with objects; the file takes other sizes, too. odd: how many of
    them may disagree, since rounding decides where a proposal or a detection lies at a threshold. Its metadata:
    ``labels`` (JSON: label → category_id and name) and ``spec`` (text, which ``DetectorSpec.parse`` reads). The
    detector stays as it is. Raises ExportError, and writes nothing, where the two disagree or packages are missing.
    """
    if not images:
        raise ExportError(f"{path}: expected at least one image to check the file on, found none; give a typical one")
    _packages()  # before anything takes time
    detector = copy.deepcopy(detector)
    detector.model.cpu()
    images = [image.detach().cpu() for image in images]
    expected = [detect(detector, [image])[0] for image in images]
    content = _with_metadata(_traced(detector.model, images[0], outputs_of(detector.spec)), detector.spec)
    exported = _opened(content, path)
    detections, differences, disagree = 0, [], 0
    for number, (image, wanted) in enumerate(zip(images, expected, strict=True), start=1):
        where = f"{path}, image {number} of {len(images)}"
        try:
            differences.append(_differences(exported(image), wanted, where, max(image.shape)))
            detections += len(wanted["boxes"])
        except ExportError:
            disagree += 1
            if disagree > min(odd, len(images) - 1):
                raise
    atomic_write_bytes(path, content)
    boxes, scores, masks = (max(values) for values in zip(*differences, strict=True))
    return OnnxCheck(len(differences), detections, boxes, scores, disagree, masks)


def load_onnx(path: Path) -> OnnxDetector:
    """A file of ``export_onnx``, ready to run; ExportError where it cannot be read or is something else."""
    try:
        return _opened(path.read_bytes(), path)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _traced(model: nn.Module, image: Tensor, outputs: tuple[str, ...]) -> bytes:
    """The model, which is changed, as ONNX; height and width stay free."""
    transform: Any = model.transform
    transform.resize = partial(_resized, shorter=transform.min_size[-1], longer=transform.max_size)
    free: dict[str, dict[int, str]] = {name: {0: "detections"} for name in outputs}
    free |= {name: axes | {2: "height", 3: "width"} for name, axes in free.items() if name == MASKS}
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values traced as constants; the check tells whether that matters
        file = Path(folder) / "traced.onnx"
        torch.onnx.export(
            _Plain(model, outputs).eval(),
            (image,),
            file,
            dynamo=False,  # the newer exporter cannot follow these models' selection of detections
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(outputs),
            dynamic_axes={"image": {1: "height", 2: "width"}, **free},
        )
        return file.read_bytes()


def _resized(image: Tensor, target: None = None, *, shorter: int, longer: int) -> tuple[Tensor, None]:
    """What torchvision's transform does with an image 3×H×W, in a form that is exact when traced.

    Its own is then computed in single precision, by which one size in sixteen came out a pixel off. So would scalars
    be: hence vectors.
    """
    size = operators.shape_as_tensor(image)[-2:].double()
    limits = torch.tensor([shorter, longer], dtype=torch.float64)
    scale = (limits / torch.stack([size.amin(), size.amax()])).amin(0, keepdim=True)
    height, width = (size * scale).floor().long()
    resized = nn.functional.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)
    return resized[0], target


def _with_metadata(content: bytes, spec: DetectorSpec) -> bytes:
    onnx, _ = _packages()
    model = onnx.load_from_string(content)
    labels = {label: {"category_id": id_, "name": name} for label, (id_, name) in enumerate(spec.labels, start=1)}
    onnx.helper.set_model_props(model, {"labels": json.dumps(labels, ensure_ascii=False), "spec": str(spec)})
    model.doc_string = ABOUT + (ABOUT_MASKS if spec.masks else "")
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _opened(content: bytes, path: Path) -> OnnxDetector:
    _, runtime = _packages()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes have no common one
        raise ExportError(f"{path}: truncated, or no ONNX file ({error}); export or copy it again") from error
    text = session.get_modelmeta().custom_metadata_map.get("spec")
    if text is None:
        raise ExportError(f"{path}: an ONNX file, but none of export_onnx: its metadata has no spec")
    try:
        return OnnxDetector(DetectorSpec.parse(text), session)
    except SpecError as error:
        raise ExportError(f"{path}: the spec in its metadata cannot be read: {error}") from error


def _differences(found: Target, expected: Target, where: str, longer: int) -> tuple[float, float, float]:
    """The largest of boxes (pixels), scores and masks (share of an object's pixels), each detection compared with the
    nearest free one of the same label.

    Their order is left open, since rounding decides it between like scores. longer: side of the image in pixels.
    """
    counts = len(expected["boxes"]), len(found["boxes"])
    if counts == (0, 0):
        return 0.0, 0.0, 0.0
    if counts[0] != counts[1]:
        raise ExportError(f"{where}: expected {counts[0]} detections, found {counts[1]} in ONNX Runtime; {REMEDY}")
    boxes = (found["boxes"] - expected["boxes"][:, None]).abs().amax(2)
    scores = (found["scores"] - expected["scores"][:, None]).abs()
    apart = (boxes / longer / BOX_TOLERANCE).maximum(scores / SCORE_TOLERANCE)
    apart[found["labels"] != expected["labels"][:, None]] = torch.inf
    missed, box, score, pairs = 0, 0.0, 0.0, []
    for row, distances in enumerate(apart):
        nearest = int(distances.argmin())
        pairs.append(nearest)
        missed += not distances[nearest] <= 1  # NaN is missed, too
        box, score = max(box, float(boxes[row, nearest])), max(score, float(scores[row, nearest]))
        apart[:, nearest] = torch.inf
    if missed:
        raise ExportError(
            f"{where}: {missed} of {counts[0]} detections differ in ONNX Runtime, boxes by up to {box:.3g} pixels and "
            f"scores by up to {score:.3g}; {REMEDY}"
        )
    return box, score, _mask_difference(found[MASKS][pairs], expected[MASKS], where) if MASKS in expected else 0.0


def _mask_difference(found: Tensor, expected: Tensor, where: str) -> float:
    """The largest share of an object's pixels that are on the other side of 0.5; masks N×1×H×W.

    A corner that rounds to another whole pixel moves the whole mask by one, so a few of many may differ.
    """
    if found.shape != expected.shape:
        raise ExportError(f"{where}: expected masks {tuple(expected.shape)}, found {tuple(found.shape)}; {REMEDY}")
    ours, theirs = (masks.flatten(1) > 0.5 for masks in (found, expected))
    share = (ours != theirs).sum(1) / (ours | theirs).sum(1).clamp(min=1)
    wrong = int((share > MASK_TOLERANCE).sum())
    if wrong > MASKS_MOVED * len(share):
        raise ExportError(
            f"{where}: {wrong} of {len(share)} masks differ in ONNX Runtime, by up to {float(share.max()):.1%} of an "
            f"object's pixels; {REMEDY}"
        )
    return float(share.max())


def _packages() -> tuple[Any, Any]:
    """onnx and onnxruntime."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ExportError(f'ONNX needs {error.name}, which is not installed: pip install "autodet[onnx]"') from error
    return onnx, onnxruntime
