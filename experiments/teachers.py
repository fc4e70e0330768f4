"""Teachers that a user names: a detector file, a state dict of torchvision or mmdetection, or a member of a pool."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from autodet.detectors import Detector, DetectorSpec, is_detector_file, load_any_detector, save_detector
from autodet.teachers import Member
from autodet.teachers.pool import MANIFEST, PoolError, TeacherPool, best_member, read_manifest
from autodet.training import Task, Workbench


def named_teacher_spec(named: Path, student: DetectorSpec, size: int | None) -> DetectorSpec:
    """What a named teacher is, read before anything starts, so that a mistake shows at once."""
    if (found := pool_and_member(named)) is not None:
        folder, member = found
        pool = TeacherPool.open(folder)
        return pool.spec_of(member or pool.space.largest)
    return load_any_detector(named, student.labels, size).spec


def named_teacher(named: Path, task: Task, size: int | None, folder: Path) -> Path:
    """A named teacher as a detector file: one of ours as it is, any other rebuilt into one in the run's folder.

    size: shorter side in pixels of the images that a state dict was trained on, which it does not say (None:
    torchvision's 800). A pool's member gets norm statistics of the task's training images.
    """
    found = pool_and_member(named)
    if found is None and is_detector_file(named):
        return named.resolve()
    pool, member = (None, None) if found is None else (TeacherPool.open(found[0]), found[1])
    name = named.stem
    if pool is not None:  # by content: the same path may hold another pool tomorrow
        name = f"member-{hashlib.sha256(f'{pool.hash} {member}'.encode()).hexdigest()[:12]}"
    rebuilt = folder / "teacher" / f"{name}.safetensors"
    if not rebuilt.exists():
        rebuilt.parent.mkdir(parents=True, exist_ok=True)
        detector = load_any_detector(named, task.student.labels, size) if pool is None else _taken(pool, member, task)
        save_detector(rebuilt, detector, {"source": str(named.resolve())})
    return rebuilt.resolve()


def member_identity(named: Path) -> dict[str, str]:
    """What pins a member that is named by a path and perhaps a limit; nothing where a file is named."""
    if (found := pool_and_member(named)) is None:
        return {}
    pool = TeacherPool.open(found[0])
    return {"pool": pool.hash, "member": str(found[1] or pool.space.largest)}


def pool_and_member(named: Path) -> tuple[Path, Member | None] | None:
    """``POOL``, ``POOL:<member>`` or ``POOL:latency_ms<=30``; None where a file is named.

    POOL is a pool's folder, or that of the run which trained it.
    """
    text, colon, member = (str(named), "", "") if named.is_dir() else str(named).partition(":")
    folder = Path(text)
    if not folder.is_dir():
        if colon and not named.exists():
            raise PoolError(f"There is neither a file {named} nor a folder {folder} of a pool.")
        return None
    folder = folder / "pool" if (folder / "pool" / MANIFEST).exists() else folder
    read_manifest(folder)  # a folder that is no pool is refused with the reason
    if "<=" in member:
        return folder, best_member(folder, dict(map(_limit, member.split(","))))
    return folder, Member.parse(member) if member else None


def _limit(text: str) -> tuple[str, float]:
    """``latency_ms<=30`` → its two sides."""
    column, _, value = text.partition("<=")
    try:
        return column.strip(), float(value)
    except ValueError:
        raise PoolError(f"Expected a limit as latency_ms<=30, found {text!r}.") from None


def _taken(pool: TeacherPool, member: Member | None, task: Task) -> Detector:
    member = member or pool.space.largest
    spec = pool.spec_of(member)
    loader = Workbench(replace(task, student=spec, fraction=1.0, teacher=None)).train_loader
    return pool.take(member, loader, Path(task.cache), task.device)
