"""Command lines: common options, what a resumed run takes from its record, and mistakes as one clear line."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from autodet.detectors.spec import FAMILIES
from autodet.lease import LeaseHeld, LeaseLost
from autodet.ledger import Ledger, LedgerError, is_run
from autodet.object_store import is_url, named, place_of
from autodet.search.session import MachineError
from autodet.training import Diverged
from autodet.working_copy import local_path, read_path

USER_ERRORS = (ValueError, OSError, LedgerError, LeaseHeld, LeaseLost, MachineError, Diverged)
INTERRUPTED = 130
PATHS, SOURCES = ("data", "cache"), ("teacher", "start", "run", "base", "pool")  # of options


def common_options(
    description: str, runs_ray: bool = True, workers: Callable[[str], Any] | None = None
) -> argparse.ArgumentParser:
    """The options that every script which trains has. workers: the type of --workers, a whole number unless given."""
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    add = parser.add_argument
    places = "a path, or s3://… or gs://…"
    add("--output", type=place, metavar="RUN", help=f"the run's folder: {places} (default: runs/<script>-<time>)")
    add("--resume", type=place, metavar="RUN", help="continue a run with its own settings")
    add("--or-resume", action="store_true", help="continue the run in --output where there is one: for restarting jobs")
    add("--seed", type=int, default=0, help="decides every random choice (default: 0)")
    if runs_ray:
        add("--address", default="local", help="'auto' inside a Ray cluster; 'local' (default) starts Ray here")
        number = "trainings at a time" if workers is None else "workers that train together, or MIN-MAX"
        add("--workers", type=workers or positive, help=f"{number} (default: the preset's)")
    return parser


def data_options(parser: argparse.ArgumentParser) -> None:
    """The options of scripts that start from data, not from another run."""
    add = parser.add_argument
    add("--data", type=on_disk, help="COCO-format folder (default: generated shapes)")
    add("--preset", choices=("smoke", "demo", "cpu", "gpu"), default="demo", help="scale of the run (default: demo)")
    add("--family", choices=FAMILIES, default="faster_rcnn", help="of the detector, or student (default: faster_rcnn)")
    cache = "decoded images and teacher outputs (default: runs/cache)"
    add("--cache", type=on_disk, default=Path("runs/cache"), help=cache)


def placement_options(parser: argparse.ArgumentParser) -> None:
    """What each training takes of a cluster."""
    add = parser.add_argument
    add("--cpus-per-trial", type=positive, help="threads of a training, and CPUs that Ray keeps for it (the preset's)")
    add("--gpus-per-trial", type=share, help="of a GPU that a training takes: 0.5 lets two share one (1 where used)")


def placement_arguments(options: argparse.Namespace) -> list[str]:
    """The same, and the number of workers, as the command line of another script."""
    names = ("workers", "cpus_per_trial", "gpus_per_trial")
    given = {"--" + name.replace("_", "-"): getattr(options, name) for name in names}
    return [str(part) for name, value in given.items() if value is not None for part in (name, value)]


def place(text: str) -> Path:
    """Where a run is written: a path, or the local copy of what an s3:// or gs:// URL names, as an option's type."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def source(text: str) -> Path:
    """What is only read: a path, or a copy of what a URL names, as an option's type. ``:MEMBER`` of a pool stays."""
    scheme, slashes, rest = text.partition("://") if is_url(text) else ("", "", text)
    named, colon, member = rest.partition(":")
    try:
        return Path(f"{read_path(f'{scheme}{slashes}{named}')}{colon}{member}")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def on_disk(text: str) -> Path:
    """A path of this machine's, as an option's type."""
    if is_url(text):
        raise argparse.ArgumentTypeError(
            f"{text}: every machine reads from its own disk. Copy it to the same path on all of them, and name that."
        )
    return Path(text)


def positive(text: str) -> int:
    """A whole number above 0, as an option's type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text}")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1, as an option's type."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, found {text}")
    return value


def absolute(path: str) -> str:
    """A path, or a URL, as an option's value that JSON can hold and that resumes from anywhere."""
    return path if is_url(path) else str(Path(path).resolve())


def new_folder(output: Path | None, script: str) -> Path:
    """The folder of a new run; ValueError where it holds one already."""
    folder = output or Path("runs") / f"{script}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / "config.json").exists():
        where = named(folder)
        raise ValueError(f"--output {where} holds a run already: continue it with --resume {where}, or name another.")
    return folder


def parsed(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    script: str,
    names: Sequence[str],
    extendable: Sequence[str] = (),
) -> argparse.Namespace:
    """The options; those of a resumed run are the recorded ones, except ``extendable`` ones that are given anew.

    ValueError where RUN is another script's, or an option is given that a resumed run cannot change.
    """
    options = parser.parse_args(argv)
    if options.or_resume and options.output is None and options.resume is None:
        parser.error("--or-resume needs --output RUN: without it each start would be a run of its own")
    if options.or_resume and options.output is not None and is_run(options.output):
        options.resume, options.output = options.output, None
    if options.resume is None:
        return options
    config = Ledger.open(options.resume).config
    if config.get("script") != script:
        raise ValueError(
            f"--resume {named(options.resume)} is a run of {config.get('script')}, expected one of {script}."
        )
    values: dict[str, Any] = {}
    for name in (*names, *extendable):
        given = getattr(options, name)
        old = config["options"].get(name, _plain(parser.get_default(name)))  # it may be newer than the run
        if name in extendable and given is not None:
            values[name] = given
        elif given != parser.get_default(name) and _plain(given) != old:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} {given} with --resume: the run was started with {old}. Leave it out, or start anew."
            )
        else:
            values[name] = old
            if old is not None and name in PATHS:
                values[name] = Path(old)
            elif old is not None and name in SOURCES:
                values[name] = source(old)
    return argparse.Namespace(**(vars(options) | values))


def recorded(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Options as JSON values; paths absolute, so that a run resumes from anywhere."""
    return {name: _plain(getattr(options, name)) for name in names}


def _plain(value: Any) -> Any:
    if not isinstance(value, Path):
        return value
    folder, colon, member = str(value).partition(":")  # of a pool
    place = place_of(Path(folder))
    return str(value.resolve()) if place is None else f"{place}{colon}{member}"


def main_of(script: Callable[[list[str] | None], int]) -> int:
    """Run a script; a user's mistake ends it with one clear message and code 2, Ctrl-C and SIGTERM with 130."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_flush_denormal(True)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return script(None)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. What was finished is recorded; go on with --resume.", file=sys.stderr)
        return INTERRUPTED


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
