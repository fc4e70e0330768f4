"""Several runs as one frame: every candidate with the facts of its run, so that runs can be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from autodet.ledger import Ledger, is_run
from autodet.results.frame import TEXT, frame_of, read_records

FACTS: dict[str, str] = {"run": TEXT, "pair": TEXT, "data": TEXT, "device": TEXT, "threads": "int64"}
UNKNOWN: dict[str, Any] = {"pair": "", "data": "", "device": "", "threads": 1}


def read_runs(paths: Sequence[Path | str]) -> pd.DataFrame:
    """One row per candidate of all runs: the columns of `frame.read_run` after `FACTS`.

    run: a name that no other of these runs has; pair: teacher → student; device, threads: of one training, "" where the
    run does not say (a search says once it has finished). Raises LedgerError for a damaged or absent run.
    """
    folders = [Path(path) for path in paths]
    frames = [
        with_facts(frame_of(read_records(folder)), folder, name)
        for folder, name in zip(folders, run_names(folders), strict=True)
    ]
    filled = [frame for frame in frames if len(frame)]  # empty ones would blur the columns' types
    if not filled:
        return frames[0] if frames else _beside(frame_of([]), {"run": "", **UNKNOWN})
    return pd.concat(filled, ignore_index=True)


def with_facts(frame: pd.DataFrame, folder: Path, name: str | None = None) -> pd.DataFrame:
    """The frame of the run in `folder` with its facts as first columns."""
    return _beside(frame, {"run": name or folder.resolve().name, **facts_of(folder)})


def _beside(frame: pd.DataFrame, facts: Mapping[str, Any]) -> pd.DataFrame:
    columns = {name: pd.Series([facts[name]] * len(frame), dtype=kind) for name, kind in FACTS.items()}
    return pd.concat([pd.DataFrame(columns), frame.reset_index(drop=True)], axis=1)


def run_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart; a run inside another's folder is named after both."""
    parts = [folder.resolve().parts for folder in folders]
    sizes = [2 if is_run(folder.resolve().parent) else 1 for folder in folders]
    names = ["/".join(part[-size:]) for part, size in zip(parts, sizes, strict=True)]
    while len(set(names)) < len(set(parts)):
        sizes = [size + (names.count(name) > 1) for name, size in zip(names, sizes, strict=True)]
        names = ["/".join(part[-size:]) for part, size in zip(parts, sizes, strict=True)]
    return names


def facts_of(folder: Path) -> dict[str, Any]:
    """What a run says about its pair, its data and the device of its trainings, as far as it does."""
    config = Ledger.open(folder).config
    search = _search_of(folder, config)
    options = _mapping((Ledger.open(search).config if search else config).get("options"))
    task = _mapping(config.get("task") or _task_file(folder))
    student = _student(config.get("student") or task.get("student"))
    teacher = _teacher(task.get("teacher") or options.get("teacher"), search)
    data = task.get("data") or options.get("data") or ("generated shapes" if options else "")
    return UNKNOWN | {
        "pair": f"{teacher} → {student}" if student else "",
        "data": Path(str(data)).name,
        "device": str(task.get("device", "")),
        "threads": int(task.get("threads", 1)),
    }


def _search_of(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """The search that a run is, lies in, or starts from."""
    if config.get("script") == "search_distiller":
        return folder
    source = _mapping(config.get("options")).get("run")
    if source is not None:
        return Path(source) if is_run(Path(source)) else None
    parent = folder.resolve().parent
    return _search_of(parent, Ledger.open(parent).config) if is_run(parent) else None


def _task_file(folder: Path) -> Any:
    path = folder / "task.json"
    return json.loads(path.read_bytes()) if path.is_file() else None


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _student(spec: Any) -> str:
    """Family and body, from a detector's text or its JSON."""
    if isinstance(spec, Mapping):
        return f"{spec.get('family', '')} {spec.get('body', '')}".strip()
    return " ".join(str(spec or "").split()[:2])


def _teacher(path: Any, search: Path | None) -> str:
    """The name of the teacher's file; a file that is named by its hash, or not yet there, is its search's own."""
    name = Path(str(path)).stem if path else ""
    if name and not re.fullmatch(r"[0-9a-f]{32,}", name):
        return name
    return f"{search.resolve().name}'s teacher" if search else "teacher"
