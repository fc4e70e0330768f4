"""Workers of a pool's training that are processes of ``torch.distributed``: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor


class DistributedWorkers:
    """The processes of the default group, which must have been set up. See ``trainer.Workers``."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all workers, in place."""
        dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor) -> None:
        """Replace a tensor by the first worker's, in place."""
        dist.broadcast(tensor, src=0)

    def merged(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums by name over all workers, in an order that is the same everywhere."""
        everyone: list[Mapping[str, float]] = [{}] * self.count
        dist.all_gather_object(everyone, dict(values))
        names = sorted({name for worker in everyone for name in worker})
        return {name: sum(worker.get(name, 0.0) for worker in everyone) for name in names}
