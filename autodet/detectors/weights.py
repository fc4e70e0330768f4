"""Weights: on disk as safetensors with a JSON header, from users' files, into modules, and by hash. Never unpickled."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from autodet.atomic import atomic_write_bytes, plain_json
from autodet.working_copy import fetch_changed

State = dict[str, Tensor]

FORMAT: Final = "autodet-weights"
FORMAT_VERSION: Final = 1
TORCH_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS: Final = ("model", "state_dict", "model_state_dict")
MODULE_PREFIX: Final = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DistributedDataParallel and torch.compile
SHOWN: Final = 4  # keys named in an error

# Names that torchvision's pyramid and heads had when its first COCO weights were published (_version 1 of the modules).
OLD_NAMES: Final = (
    (re.compile(r"\bfpn\.(inner_blocks|layer_blocks)\.(\d+)\.(weight|bias)$"), r"fpn.\1.\2.0.\3"),
    (re.compile(r"\brpn\.head\.conv\.(weight|bias)$"), r"rpn.head.conv.0.0.\1"),
    *(
        (re.compile(rf"\b(classification|regression)_head\.conv\.{2 * i}\.(weight|bias)$"), rf"\1_head.conv.{i}.0.\2")
        for i in range(4)
    ),
    *((re.compile(rf"\bmask_head\.mask_fcn{i + 1}\.(weight|bias)$"), rf"mask_head.{i}.0.\1") for i in range(8)),
)
FCOS_MARK: Final = "bbox_ctrness"  # a head that has it is numbered as RetinaNet's was before, and still is


class WeightsError(ValueError):
    """Weights that cannot be read, written, or put into a module."""


def save_weights(path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata (JSON values) to one safetensors file in one step that survives a crash.

    Tensors may share memory, be non-contiguous, or lie on another device: each is written out in full.
    """
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(
            f"expected only tensors in a state dict, found {_some(strange)} that are none; leave them out"
        )
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    text = json.dumps(plain_json(metadata), allow_nan=False, ensure_ascii=False, sort_keys=True)
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "metadata": text}
    atomic_write_bytes(path, safetensors.torch.save(tensors, metadata=header))


def load_weights(path: Path | str) -> tuple[State, dict[str, Any]]:
    """Tensors (on the CPU) and metadata of a file written by ``save_weights``.

    Raises WeightsError where the file is missing, truncated, no safetensors, of another program or a newer version.
    """
    state, header = _read_safetensors(Path(path))
    if header.get("format") != FORMAT:
        raise WeightsError(
            f"{path}: expected a file written by autodet, found other safetensors; read its weights by read_state_dict"
        )
    return state, _metadata(path, header)


def metadata_of(path: Path | str) -> dict[str, Any] | None:
    """The metadata alone of a file written by ``save_weights``; None of a file of another program.

    Raises WeightsError as ``load_weights`` does; a file whose name does not end in .safetensors is not read.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return None
    with _opened(path) as file:
        header = dict(file.metadata() or {})
    return _metadata(path, header) if header.get("format") == FORMAT else None


def _metadata(path: Path | str, header: Mapping[str, str]) -> dict[str, Any]:
    if header.get("format_version") != str(FORMAT_VERSION):
        found = header.get("format_version")
        raise WeightsError(f"{path}: expected format version {FORMAT_VERSION}, found {found}; update autodet")
    try:
        metadata: dict[str, Any] = json.loads(header["metadata"])
    except (KeyError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: its header's metadata is no JSON ({error}); write the file again") from error
    return metadata


def read_state_dict(path: Path | str) -> State:
    """A user's weights, on the CPU, with torchvision's present names: .safetensors, or .pt/.pth without unpickling.

    A state dict may be wrapped ({"model": …}, {"state_dict": …}) and prefixed ("module.", "_orig_mod.").
    Raises WeightsError where the file is missing, damaged, of another type, or holds something else.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        content: object = _read_safetensors(path)[0]
    elif path.suffix in TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise WeightsError(f"{path}: expected a file of weights ({known}), found {path.suffix or 'no suffix'}")
    state = _unwrapped(content)
    if not isinstance(state, Mapping) or not state:
        raise WeightsError(f"{path}: expected a state dict, found {type(state).__name__}; save model.state_dict()")
    strange = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(
            f"{path}: expected names and tensors, found other values at {_some(strange)}; save model.state_dict()"
        )
    if all(MODULE_PREFIX.match(key) for key in state):
        state = {MODULE_PREFIX.sub("", key): value for key, value in state.items()}
    return modern_names(state)


def modern_names(state: Mapping[str, Tensor]) -> State:
    """The same tensors under torchvision's present names, where they have those of its first COCO files."""
    fcos = any(FCOS_MARK in key for key in state)
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in OLD_NAMES:
            key = key if fcos and "_head.conv." in key else pattern.sub(replacement, key)
        renamed[key] = value
    return renamed


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, types, shapes and values; the order of keys, the device and strides do not matter."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode() + b"\n")
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class LoadReport:
    """What ``load_matching`` did, by key. missing: in the module only; unexpected: in the state dict only.

    mismatched: (key, the module's shape, the state dict's shape).
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        """Whether the state dict fits exactly."""
        return not (self.missing or self.unexpected or self.mismatched)

    def problems(self) -> str:
        """The misfits in words, the first few of each kind with their shapes."""
        different = [f"{key} (expected {expected}, found {found})" for key, expected, found in self.mismatched]
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", different))
        return "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds if keys)


def load_matching(module: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    """Copy the tensors that fit the module by name and shape; the rest of the module stays as it is.

    ``num_batches_tracked`` is passed over on both sides, so that batch norms and frozen ones take each other's weights.
    """
    report = _compare(module, state)
    module.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    return report


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str = "the state dict") -> LoadReport:
    """Like ``load_matching``, but raises WeightsError, and changes nothing, unless everything fits."""
    report = _compare(module, state)
    if not report.complete:
        raise WeightsError(
            f"{source} does not fit {type(module).__name__}: {report.problems()}; give weights of the same architecture"
        )
    return load_matching(module, state)


def _compare(module: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    shared = [key for key in own if key in state]
    return LoadReport(
        loaded=tuple(key for key in shared if own[key].shape == state[key].shape),
        missing=tuple(key for key in own if key not in state and not _is_counter(key)),
        unexpected=tuple(key for key in state if key not in own and not _is_counter(key)),
        mismatched=tuple(
            (key, tuple(own[key].shape), tuple(state[key].shape))
            for key in shared
            if own[key].shape != state[key].shape
        ),
    )


def _is_counter(key: str) -> bool:
    """Batch norm's count of batches, which frozen norms lack and which has no effect with a fixed momentum."""
    return key.rpartition(".")[2] == "num_batches_tracked"


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; what goes wrong while it is read is a WeightsError."""
    try:
        fetch_changed(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise WeightsError(f"{path}: truncated, or no safetensors file ({error}); copy or write it again") from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _read_torch(path: Path) -> object:
    try:
        # torchvision's reference scripts store their options beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(
            f"{path}: no weights, or Python objects beside them, which are not loaded for safety ({reason}); "
            "write it again with torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{path}: truncated, or no PyTorch file ({error}); copy or write it again") from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _unwrapped(content: object) -> object:
    if isinstance(content, Mapping):
        for name in WRAPPERS:
            if isinstance(content.get(name), Mapping):
                return content[name]
    return content


def _some(keys: tuple[str, ...] | list[Any]) -> str:
    rest = len(keys) - SHOWN
    return ", ".join(map(str, keys[:SHOWN])) + (f", and {rest} more" if rest > 0 else "")
