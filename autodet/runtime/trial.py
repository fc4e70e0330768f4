"""What runs inside a trial: one candidate, trained by an evaluator that the process keeps between candidates."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
from ray import tune
from ray.util.metrics import Gauge

import autodet
from autodet.data import DatasetError
from autodet.detectors.weights import WeightsError
from autodet.joint import JointBench, JointTask
from autodet.runtime.weight_cache import shared_weights
from autodet.search.candidate import Candidate
from autodet.training import Epoch, Outcome, Task, Workbench
from autodet.training.task import OnEpoch
from autodet.working_copy import spare

METRIC = "ap"
ENVIRONMENT = "environment"  # an outcome's status where the machine failed, not the candidate


class Evaluator(Protocol):
    """Trains and judges a run's candidates."""

    epochs: int  # of a candidate's training

    def seed_of(self, candidate: Candidate) -> int:
        """What decides the candidate's random choices, for its record."""
        ...

    def evaluate(self, candidate: Candidate, folder: Path, on_epoch: OnEpoch) -> Outcome:
        """Train and measure a candidate; resumes from ``folder``."""
        ...


# Reused processes find data, caches, and teachers here; keyed by the task, so another run's task never meets them.
_evaluators: dict[str, Evaluator] = {}


class FormulaEvaluator:
    """Candidates that train the same student by different formulas."""

    def __init__(self, task: Task) -> None:
        self.bench, self.epochs = Workbench(task), task.settings.epochs

    def seed_of(self, candidate: Candidate) -> int:
        return self.bench.task.seed + candidate.replicate

    def evaluate(self, candidate: Candidate, folder: Path, on_epoch: OnEpoch) -> Outcome:
        return self.bench.run(candidate.formula, candidate.inherit, candidate.replicate, folder, on_epoch)


class StudentEvaluator(JointBench):
    """Candidates that train different students; weights come through the node's cache."""

    def __init__(self, task: JointTask) -> None:
        super().__init__(task, shared_weights)
        self.epochs = task.task.settings.epochs


def make_trainable(task: Task | JointTask, folder: Path) -> Callable[[Mapping[str, Any]], None]:
    """A Tune function trainable for candidates of one task. Any searcher may drive it.

    Its config holds ``candidate`` (Candidate.to_json()) and, from our searches, the candidate's number ``id``, under
    which its checkpoint lies in ``folder``. Reports ``ap`` (0–1) after each measured epoch, and ``outcome``, the
    ledger's told payload as JSON, at the end. An error of training is an outcome, not an exception.
    """
    text, root, joint, driver = task.to_json(), str(folder), isinstance(task, JointTask), code_here()

    def train_candidate(config: Mapping[str, Any]) -> None:
        name = f"{int(config['id']):06d}" if "id" in config else tune.get_context().get_trial_id()
        title = f"{'joint' if joint else 'distiller'}/{config.get('title', name)}"

        def report(values: dict[str, Any]) -> None:
            tune.report(values)
            show_title(title)  # Tune has named the process after its own method meanwhile

        seed, evaluator = None, None
        try:
            show_title(title)
            check_code(driver)  # before anything is read that another version may have written otherwise
            task = JointTask.from_json(text) if joint else Task.from_json(text)
            candidate = Candidate.from_json(config["candidate"])
            torch.set_num_threads(task.threads)
            torch.set_flush_denormal(True)
            evaluator = _evaluator(text, task)
            seed = evaluator.seed_of(candidate)
            outcome = run_candidate(evaluator, candidate, Path(root) / name, report, show_speed)
        except (OSError, DatasetError, WeightsError) as error:
            # No fault of the candidate: a full disk, data or weights that this machine cannot read. It stays open, and
            # the run stops, to go on once that is mended.
            outcome = {"status": ENVIRONMENT, "ap": None, "cause": f"{type(error).__name__}: {error}"}
        # Whatever else it was, it is this candidate's end and goes into its record. Raised, Tune would train it again
        # and then forget the cause. Tune's own request to stop is no Exception and passes.
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            outcome = {"status": "failed", "ap": None, "seed": seed, "cause": cause}
            if not answers(device_of(text)):
                if evaluator is not None:  # after some errors a GPU answers no more in this process, but in a fresh one
                    os._exit(1)
                outcome["status"] = ENVIRONMENT
        if outcome["status"] != ENVIRONMENT:
            spare(Path(root).parent, Path(root) / name)
        tune.report({"id": config.get("id"), METRIC: outcome["ap"] or 0.0, "outcome": json.dumps(outcome)})

    return train_candidate


def run_candidate(
    evaluator: Evaluator,
    candidate: Candidate,
    folder: Path,
    report: Callable[[dict[str, Any]], None],
    on_speed: Callable[[float], None] = lambda images_per_second: None,
) -> dict[str, Any]:
    """Train and measure one candidate; the told payload. Without Ray when ``report`` is any function."""
    started, last_ap = time.perf_counter(), [0.0]

    def on_epoch(epoch: Epoch, ap: float | None) -> None:
        last_ap[0] = last_ap[0] if ap is None else ap
        on_speed(epoch.images_per_second)
        if epoch.number < evaluator.epochs:
            seconds = time.perf_counter() - started
            losses = {name: round(loss, 5) for name, loss in epoch.losses.items()}
            # Tune wants the metric in every report; ``measured`` says whether it is one.
            report(
                {
                    "epoch": epoch.number,
                    METRIC: last_ap[0],
                    "measured": ap is not None,
                    "seconds": round(seconds, 3),
                    "losses": json.dumps(losses),
                    "pid": os.getpid(),
                }
            )

    try:
        result = evaluator.evaluate(candidate, folder, on_epoch)
    finally:
        on_speed(0.0)  # a gauge keeps its last value
    return {
        "status": "completed",
        "seed": evaluator.seed_of(candidate),
        "ap": result.metrics.ap,
        "metrics": result.metrics.to_json(),
        "epochs": result.epochs,
        "seconds": round(result.seconds, 3),
        "cause": None,
        "weights": result.weights,
        "extra": result.notes,
    }


def show_title(name: str) -> None:
    """Show a candidate's name where Ray's dashboard lists a machine's processes, which otherwise are all alike."""
    raylet: Any = ray._raylet
    if hasattr(raylet, "setproctitle"):  # it is no public one
        raylet.setproctitle(f"ray::{name}")


@lru_cache(maxsize=1)
def code_here() -> str:
    """What has to be the same on all machines of a run: autodet, to the letter, and PyTorch's version."""
    package = Path(autodet.__file__).parent
    sources = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sources.update(str(path.relative_to(package)).encode() + path.read_bytes())
    torch_version = torch.__version__.partition("+")[0]  # a machine without a GPU has another build of it
    return f"autodet {autodet.__version__} ({sources.hexdigest()[:8]}) and torch {torch_version}"


def check_code(wanted: str) -> None:
    """OSError where this machine's code is not the driver's."""
    if (found := code_here()) != wanted:
        here = f"{found} on {platform.node()}"
        raise OSError(f"{here}, but {wanted} where the driver runs. Install the same on all machines, then resume.")


def device_of(text: str) -> str:
    """The device in the text of a task."""
    values = json.loads(text)
    return str(values.get("task", values)["device"])


def answers(device: str) -> bool:
    """Whether a device does the simplest thing."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1.0
    except RuntimeError:
        return False


@lru_cache(maxsize=1)
def _speed() -> Gauge:
    return Gauge("autodet_images_per_second", "images a second that a training process trains on")


def show_speed(images_per_second: float) -> None:
    """The speed of this process's training on Ray's dashboard."""
    _speed().set(images_per_second)


def _evaluator(text: str, task: Task | JointTask) -> Evaluator:
    if text not in _evaluators:
        _evaluators.clear()  # one at a time: a reused process would otherwise hold every teacher it ever had
        _evaluators[text] = StudentEvaluator(task) if isinstance(task, JointTask) else FormulaEvaluator(task)
    return _evaluators[text]
