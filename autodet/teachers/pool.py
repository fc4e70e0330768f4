"""A trained pool: one folder from which any member can be had as a working detector, with no further training.

``manifest.json`` says what the pool is and the hash of its weights, ``weights.safetensors`` holds the largest member's
weights, of which all others' are slices, ``members.csv`` what a spread of members costs and achieves. A pool is only
read; norm statistics of members are kept elsewhere, in the folder of caches.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from autodet.atomic import atomic_write_bytes, atomic_write_json
from autodet.data import Loader
from autodet.detectors import Detector, DetectorSpec, SpecError
from autodet.detectors.channels import channel_groups
from autodet.detectors.weights import WeightsError, load_weights, save_weights, weights_hash
from autodet.records import Cost
from autodet.teachers.elastic import Take, copies_of, member_spec, sliced
from autodet.teachers.space import Member, PoolSpace, SpaceError
from autodet.teachers.statistics import BATCH, IMAGES, measure_statistics, statistics_of
from autodet.working_copy import fetch_changed

FORMAT, VERSION = "autodet-pool", 1
STATISTICS_FORMAT = 3  # of the way in which they are measured
LIMITED = ("latency_ms", "macs_g", "params_m")  # by which a member can be looked up
MANIFEST, WEIGHTS, MEMBERS = "manifest.json", "weights.safetensors", "members.csv"


class PoolError(ValueError):
    """A folder that is no complete pool, or a member that cannot be taken from it."""


@dataclass(frozen=True)
class MemberRow:
    """A member that was measured: AP (0–1) on ``split``, and what a detection costs.

    ap_before: with slices of the largest member's norm statistics in place of its own. mask_ap: AP of its masks; None
    where it gives none.
    """

    member: Member
    ap: float
    ap_before: float
    split: str
    cost: Cost
    mask_ap: float | None = None


class TeacherPool:
    """A trained pool, read from its folder.

    spec: of the largest member. weights: gives copies of slices of its tensors. hash: of its weights. notes: how it was
    trained (JSON values).
    """

    def __init__(
        self, space: PoolSpace, spec: DetectorSpec, weights: Take, hash: str, notes: Mapping[str, Any]
    ) -> None:
        self.space, self.spec, self.weights, self.hash, self.notes = space, spec, weights, hash, notes
        self._groups = channel_groups(spec)

    @classmethod
    def open(cls, folder: Path) -> TeacherPool:
        """The pool in a folder; PoolError names the file that is missing, cut off, changed or of another program."""
        manifest = read_manifest(folder)
        path = folder / WEIGHTS
        try:
            state, header = load_weights(path)
        except (WeightsError, OSError) as error:
            raise PoolError(f"{folder} is no complete pool: {error}") from error
        if header.get("spec") != manifest["spec"]:
            raise PoolError(f"{path} is of another detector than {folder / MANIFEST} says. Copy both files again.")
        found = weights_hash(state)
        if found != manifest["weights"]:
            raise PoolError(
                f"{path} has the hash {found[:12]}…, {MANIFEST} names {str(manifest['weights'])[:12]}…: one of them is"
                " of another training. Copy both files again, or train the pool anew."
            )
        return cls.of_manifest(manifest, copies_of(state))

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any], weights: Take) -> TeacherPool:
        """A pool whose weights come from elsewhere than its folder, such as a cache, and have been checked there."""
        space, spec = PoolSpace.parse(manifest["space"]), DetectorSpec.from_json(manifest["spec"])
        return cls(space, spec, weights, manifest["weights"], manifest["notes"])

    def spec_of(self, member: Member) -> DetectorSpec:
        """The detector that a member is; SpaceError where it is not in the pool."""
        self.space.check(member)
        return member_spec(self.spec, member)

    def extract(self, member: Member) -> Detector:
        """A member's weights as a detector of its own, without norm statistics: ``take`` also measures these."""
        return sliced(self.spec_of(member), self._groups, self.weights)

    def take(self, member: Member, loader: Loader, cache: Path | None = None, device: str = "cpu") -> Detector:
        """A member as a working detector, in evaluation mode; its norm statistics are measured on the loader's images.

        cache: a folder that keeps statistics by member and images, so that a member is had in a moment again.
        """
        detector = self.extract(member)
        detector.model.to(device)
        path = None if cache is None else cache / "statistics" / f"{self._statistics_key(detector, loader)}.safetensors"
        if path is not None and path.exists() and _put_statistics(detector, path):
            return detector
        measure_statistics(detector, loader)
        detector.model.eval()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_weights(path, statistics_of(detector), {"member": str(member), "pool": self.hash})
        return detector

    def _statistics_key(self, detector: Detector, loader: Loader) -> str:
        """All that a member's statistics depend on."""
        images = [loader.cache.path.name, loader.dataset.annotations_hash, IMAGES, BATCH]
        parts = [STATISTICS_FORMAT, self.hash, str(detector.spec), *images]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _put_statistics(detector: Detector, path: Path) -> bool:
    """Give a detector the norm statistics of a file; False, and a file less, where it cannot be used."""
    own = statistics_of(detector)
    try:
        kept, _ = load_weights(path)
        if {name: value.shape for name, value in kept.items()} != {name: value.shape for name, value in own.items()}:
            raise WeightsError(f"{path} has statistics of other norms.")
    except (WeightsError, OSError) as error:
        logging.warning("%s They are measured anew.", error)
        path.unlink(missing_ok=True)
        return False
    for name, value in own.items():
        value.copy_(kept[name])
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a pool's folder says of itself; PoolError where it is no complete pool."""
    path = folder / MANIFEST
    fetch_changed(path)
    if not path.exists():
        raise PoolError(f"{folder} is no complete pool: it has no {MANIFEST}. Train one by train_teacher_pool.py.")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise PoolError(
                f"{path}: expected {FORMAT} of version {VERSION}, found {manifest['format']} of {manifest['version']}:"
                " written by another program or release."
            )
        space, spec = PoolSpace.parse(manifest["space"]), DetectorSpec.from_json(manifest["spec"])
        if not isinstance(manifest["weights"], str) or not isinstance(manifest["notes"], dict):
            raise TypeError(f"weights is {manifest['weights']!r}, expected a hash, beside notes")
        if (spec.body, spec.min_size) != (space.largest.body, space.largest.size):
            raise PoolError(f"{path}: the detector {spec} is not the space's largest member, {space.largest}.")
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError, SpaceError, SpecError) as error:
        raise PoolError(
            f"{path} is no manifest of a pool ({error!r}). Copy it again, or train the pool anew."
        ) from error
    found: dict[str, Any] = manifest
    return found


def save_pool(folder: Path, detector: Detector, space: PoolSpace, notes: Mapping[str, Any]) -> None:
    """Write a pool; the manifest last, so that a folder that has one is complete."""
    state = {name: value.detach().cpu() for name, value in detector.model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS, state, {"spec": detector.spec.to_json()})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "space": str(space),
        "spec": detector.spec.to_json(),
        "weights": weights_hash(state),
        "notes": dict(notes),
    }
    atomic_write_json(folder / MANIFEST, manifest)


def save_members(folder: Path, rows: Iterable[MemberRow]) -> None:
    """The table of measured members, ``members.csv`` in the pool's folder."""
    frame = pd.DataFrame([_flat(row) for row in rows])
    atomic_write_bytes(folder / MEMBERS, frame.to_csv(index=False).encode())


def read_members(folder: Path) -> pd.DataFrame:
    """The table of measured members: member (text), ap, split, latency_ms, …, and mask_ap of those with masks.

    PoolError where there is none.
    """
    path = folder / MEMBERS
    if not path.exists():
        raise PoolError(
            f"{folder} has no {MEMBERS}: its members were not measured yet; train_teacher_pool.py --resume."
        )
    frame = pd.read_csv(path)
    missing = [column for column in ("member", "ap", *LIMITED) if column not in frame]
    if missing:
        raise PoolError(f"{path} has no column {', '.join(missing)}: delete it and let members be measured anew.")
    return frame


def best_member(folder: Path, limits: Mapping[str, float]) -> Member:
    """The measured member of the highest AP within limits, such as ``{"latency_ms": 30}``; PoolError if none is."""
    frame = read_members(folder)
    unknown = sorted(set(limits) - set(LIMITED))
    if unknown:
        raise PoolError(f"Expected limits of {', '.join(LIMITED)}, found {', '.join(unknown)}.")
    within = frame
    for column, limit in limits.items():
        within = within[within[column] <= limit]
    if within.empty:
        least = ", ".join(f"{column} {frame[column].min():.3g}" for column in limits)
        wanted = ", ".join(f"{column} ≤ {limit:g}" for column, limit in limits.items())
        raise PoolError(f"No measured member of {folder} has {wanted}; the least are {least}.")
    return Member.parse(str(within.sort_values("ap", ascending=False)["member"].iloc[0]))


def _flat(row: MemberRow) -> dict[str, Any]:
    found = {"member": str(row.member), "ap": row.ap, "ap_before": row.ap_before, "split": row.split}
    found |= {} if row.mask_ap is None else {"mask_ap": row.mask_ap}
    return found | row.cost.to_json()
