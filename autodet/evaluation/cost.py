"""What a detector costs: latency in ms, multiply-adds in G, parameters in M.

Latencies are of this machine at this moment. To compare detectors, measure them interleaved and use ratios.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torchvision  # noqa: F401 - makes its operators known to torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autodet.records import Cost

Run = Callable[[], object]
LEAST_ROUNDS = 10  # of a ratio: an error from fewer means little


class Latency(NamedTuple):
    """Milliseconds a call: median and 90th percentile."""

    median_ms: float
    p90_ms: float


def measure_latency(
    run: Run, device: torch.device | str = "cpu", warmup: int = 3, repeats: int = 20, threads: int = 1
) -> Latency:
    """Time ``run``, called ``warmup`` times unmeasured, then ``repeats`` times; no gradients are recorded.

    threads: PyTorch's threads on the CPU meanwhile; the former number is put back. On a GPU each call is timed until
    its work is done. ``run`` should hold the whole detector with post-processing, in evaluation mode.
    """
    return measure_latencies_interleaved({"run": run}, device, warmup, repeats, threads)["run"]


def measure_latencies_interleaved(
    runs: Mapping[str, Run], device: torch.device | str = "cpu", warmup: int = 3, repeats: int = 20, threads: int = 1
) -> dict[str, Latency]:
    """Like ``measure_latency`` for several: each round calls all of them, every other round backwards.

    A machine that slows down, by heat or by neighbours, then slows all alike, and ratios stay meaningful.
    """
    if warmup < 0 or repeats < 1 or threads < 1:
        raise ValueError(f"expected warmup ≥ 0, repeats ≥ 1, threads ≥ 1, found {warmup}, {repeats}, {threads}")
    device, names = torch.device(device), list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _cpu_threads(threads), torch.no_grad():
        for turn in range(-warmup, repeats):
            for name in names if turn % 2 == 0 else reversed(names):
                seconds = _timed(runs[name], device)
                if turn >= 0:
                    times[name].append(seconds)
    return {name: _summary(seconds) for name, seconds in times.items()}


class LatencyRatio(NamedTuple):
    """Times of one detector over those of another, measured by turns: median (where there are several images, the mean
    of each one's median), its standard error, rounds."""

    ratio: float
    spread: float
    rounds: int


def measure_latency_ratio(
    run: Run,
    base: Run,
    device: torch.device | str = "cpu",
    threads: int = 1,
    precision: float = 0.01,
    most: int = 60,
    images: int = 1,
) -> LatencyRatio:
    """How much longer ``run`` takes than ``base``, timed in rounds until the median's standard error is small.

    precision: of the error, as a share of the ratio; most: rounds, if it is not reached. images: that the runs take in
    turn, one a call. How the ratio differs between them is no error; that is of a median, 1.2533 σ/√n, with σ from the
    quartiles of what each image's rounds differ from their own median by, so that single disturbances hardly count.
    """
    device, warmup = torch.device(device), -(-2 // images) * images  # all images, twice where there is one
    ratios: list[float] = []
    with _cpu_threads(threads), torch.no_grad():
        for turn in range(-warmup, most):
            # The order changes with every look at an image, so that being first is no image's own.
            first, second = (run, base) if turn // images % 2 else (base, run)
            times = {first: _timed(first, device), second: _timed(second, device)}
            if turn >= 0:
                ratios.append(times[run] / times[base])
            if turn + 1 >= max(LEAST_ROUNDS, 2 * images) and (turn + 1) % images == 0:
                ratio, error = _ratio(ratios, images)
                if error <= precision * ratio:
                    break
    return LatencyRatio(*_ratio(ratios, images), len(ratios))


def _ratio(ratios: list[float], images: int) -> tuple[float, float]:
    """See ``measure_latency_ratio``: ratio and error."""
    of_images = [ratios[place::images] for place in range(images) if ratios[place::images]]
    medians = [float(np.median(values)) for values in of_images]
    rest = [value - median for values, median in zip(of_images, medians, strict=True) for value in values]
    low, high = np.percentile(rest, (25, 75))
    known = max(1, len(rest) - len(medians))  # each median takes one of them
    return float(np.mean(medians)), 1.2533 * float(high - low) / 1.349 / math.sqrt(known)


def count_macs(run: Callable[..., object], *inputs: object) -> float:
    """Multiply-adds of ``run(*inputs)`` in G, convolutions and matrix products only, half of PyTorch's count of FLOPs.

    ``run`` is called once, as it is and without gradients: put a module into evaluation mode before. NMS, RoIAlign,
    norms and activations are not counted. For a detector the number depends on the image's size and the proposals.
    """
    known = {torch.ops.torchvision.deform_conv2d: _deformable_flops}  # which runs on a GPU; on a CPU it is a product
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        run(*inputs)
    return float(counter.get_total_flops()) / 2 / 1e9


def _deformable_flops(maps: torch.Size, weight: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    """FLOPs of torchvision's deformable convolution, by the shapes of its tensors: an ordinary one's."""
    return 2 * out_shape[0] * out_shape[2] * out_shape[3] * weight.numel()


def count_params(module: nn.Module) -> float:
    """Parameters in M, shared ones once, frozen ones too; buffers such as a frozen norm's scale are not parameters."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def cost_of(
    run: Run,
    module: nn.Module,
    device: torch.device | str = "cpu",
    threads: int = 1,
    batch: int = 1,
    warmup: int = 3,
    repeats: int = 20,
) -> Cost:
    """All costs of a detector. run: detects on one fixed batch of ``batch`` images; module: whose parameters count."""
    latency = measure_latency(run, device, warmup, repeats, threads)
    return Cost(
        latency_ms=latency.median_ms,
        latency_p90_ms=latency.p90_ms,
        device=device_name(torch.device(device)),
        threads=threads,
        batch=batch,
        macs_g=count_macs(run) / batch,
        params_m=count_params(module),
    )


def _timed(run: Run, device: torch.device) -> float:
    _finish(device)
    start = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    """Wait for the work given to a GPU; on the CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(seconds: list[float]) -> Latency:
    median, p90 = np.percentile(seconds, (50, 90)) * 1e3
    return Latency(float(median), float(p90))


@contextmanager
def _cpu_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_name(device: torch.device) -> str:
    """As records name it: ``cpu``, or ``cuda`` with the GPU's model."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
