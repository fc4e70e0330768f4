"""What a child would be and cost, asked before it is trained: built with its parent's weights, timed beside a base."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from random import Random

from torch import Tensor, nn

from autodet.detectors import Detector, SpecError, build, detect, load_detector
from autodet.detectors.arch import ArchError
from autodet.evaluation import count_macs, count_params, measure_latency, measure_latency_ratio
from autodet.joint.bench import JointBench
from autodet.morphism.actions import Action, derive
from autodet.morphism.morph import MorphError
from autodet.records import RelativeCost
from autodet.search import Examined
from autodet.search.session import MachineError

FAILURES = 8  # of a user's measurement, one after another
PRECISION, MOST_ROUNDS = 0.015, 40  # of a timing in a search; trainings stand still meanwhile
UserCost = Callable[[nn.Module], float]  # a torchvision detector → milliseconds on the user's device


def in_turn(detector: Detector, images: Sequence[Tensor]) -> Callable[[], object]:
    """Detects on the next image at every call."""
    turn = cycle(images)
    return lambda: detect(detector, [next(turn)])


class Examiner:
    """An ``Examine`` of the joint search, in the driver's process and so on its device.

    A timing waits until no worker of this machine is in the middle of a step (``Quiet``). It takes a few images of the
    split in turn, one at a time, as they are trained on: decoding and resizing the file are left out. milliseconds: a
    user's own measurement in place of timing.
    """

    def __init__(
        self,
        bench: JointBench,
        base: str,
        milliseconds: UserCost | None = None,
        base_ms: float | None = None,
        rounds: int = MOST_ROUNDS,
    ) -> None:
        """base: hash of the base's weights. base_ms: what the base took when the search began, None to time it now.
        rounds: of a timing, at most.

        ValueError where the user's measurement of the base fails or is no positive number.
        """
        self.base, self._bench, self._milliseconds = base, bench, milliseconds
        self._base, _ = load_detector(bench.task.weights_file(base))
        self._base.model.to(bench.task.task.device)
        self._quiet, self._failures, self._rounds = bench.task.locks(), 0, rounds
        self.base_ms = base_ms or self._base_milliseconds()

    def __call__(self, weights: str, actions: Sequence[Action], draw: int) -> Examined | str:
        """See ``Examine``. A parent whose file is gone raises WeightsError, a disk that fails OSError, a user's
        measurement that fails again and again MachineError; other failures refuse the child."""
        spec, state = self._bench.parent(weights)
        try:
            spec, state = derive(actions, spec, state, Random(draw))
            child = build(spec)
            child.model.load_state_dict(state)
            return Examined(spec, self.cost(child))
        except (MorphError, SpecError, ArchError) as error:
            return str(error)
        except (OSError, MachineError):
            raise
        # The user's own function, or a GPU without room: the same child would end every resumed run again.
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def cost(self, detector: Detector, precision: float = PRECISION, rounds: int | None = None) -> RelativeCost:
        """What a detector costs, beside the base. precision, rounds: of the timing, see ``measure_latency_ratio``."""
        task = self._bench.task.task
        detector.model.to(task.device).eval()
        images = self._bench.images(detector.spec)
        macs, params = self._macs(detector, images), count_params(detector.model)
        if self._milliseconds is not None:
            milliseconds = self._by_user(detector)
            return RelativeCost(milliseconds / self.base_ms, 0.0, milliseconds, macs, params)
        run, base = in_turn(detector, images), in_turn(self._base, self._bench.images(self._base.spec))
        with self._alone():
            found = measure_latency_ratio(
                run,
                base,
                task.device,
                task.threads,
                precision,
                rounds or self._rounds,
                len(images),
            )
        return RelativeCost(found.ratio, found.spread, found.ratio * self.base_ms, macs, params)

    def base_cost(self) -> RelativeCost:
        """The base's own cost, of ratio 1."""
        macs = self._macs(self._base, self._bench.images(self._base.spec))
        return RelativeCost(1.0, 0.0, self.base_ms, macs, count_params(self._base.model))

    def _base_milliseconds(self) -> float:
        if self._milliseconds is not None:
            return self._by_user(self._base)
        task, run = self._bench.task.task, in_turn(self._base, self._bench.images(self._base.spec))
        with self._alone():
            return measure_latency(run, task.device, threads=task.threads).median_ms

    @staticmethod
    def _macs(detector: Detector, images: Sequence[Tensor]) -> float:
        """The mean over images; of a shape the first one stands for all: the others differ by a few proposals."""
        first = {image.shape: image for image in reversed(images)}
        counted = {shape: count_macs(detect, detector, [image]) for shape, image in first.items()}
        return sum(counted[image.shape] for image in images) / len(images)

    def _by_user(self, detector: Detector) -> float:
        """The user's measurement, which may be a timing on this machine. ValueError where it fails."""
        assert self._milliseconds is not None
        with self._alone():
            try:
                found = self._milliseconds(detector.model)
            except Exception as error:  # the user's own code, of which anything may come
                raise self._failed(f"the measurement failed: {type(error).__name__}: {error}") from error
        if not (isinstance(found, (int, float)) and math.isfinite(found) and found > 0):
            raise self._failed(f"the measurement gave {found!r} ms, expected a number above 0")
        self._failures = 0
        return float(found)

    def _failed(self, what: str) -> Exception:
        """A failure refuses the child; many in a row end the search, which would have every child refused."""
        self._failures += 1
        if self._failures < FAILURES:
            return ValueError(what)
        return MachineError(f"--cost: {what}, {FAILURES} times in a row. Mend it and go on with --resume.")

    def _alone(self) -> AbstractContextManager[object]:
        return nullcontext() if self._quiet is None else self._quiet.alone()
