"""From cached images to batches for a torchvision detector: which images, in which order, mirrored or not.

The order is a pure function of seed and epoch, so that training can resume at any batch and every candidate of a
search sees the same batches.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autodet.data.cache import ImageCache
from autodet.data.checks import DatasetError
from autodet.data.coco import CocoDataset, ImageRecord
from autodet.data.masks import resized_masks


@dataclass(frozen=True)
class BatchKey:
    """What a batch holds: positions in the data set, and which of these images are mirrored left to right."""

    indices: tuple[int, ...]
    flipped: tuple[bool, ...]


@dataclass
class Batch:
    """Images float32 3×H×W in [0, 1] of different sizes, with torchvision's targets."""

    key: BatchKey
    images: list[Tensor]
    targets: list[dict[str, Tensor]]


@dataclass(frozen=True)
class BatchPlan:
    """How images are dealt into batches; the last batch of the deal may be smaller, none is left out.

    `flip` is the probability of mirroring. With `fixed` the deal is made once from the seed; an epoch only shuffles
    the batches and mirrors whole ones, so that at most 2 · ceil(images / batch_size) different batches exist and a
    teacher's outputs can be cached by key. Otherwise every epoch deals anew and mirrors each image on its own.
    """

    batch_size: int
    seed: int
    flip: float = 0.5
    fixed: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.seed < 0 or not 0 <= self.flip <= 1:
            raise ValueError(f"expected batch_size ≥ 1, seed ≥ 0 and flip in [0, 1], found {self}")

    def epoch(self, n_images: int, epoch: int, groups: Sequence[int] | None = None) -> list[BatchKey]:
        """The batches of an epoch (counted from 0), a function of the arguments alone.

        Images of the same group are dealt together (to save padding, images of like shape should form a group); where
        a group does not fill its last batch, the next group does.
        """
        # The streams need different entropy: numpy pads it with zeros, so [seed] and [seed, 0] would be the same.
        rng = np.random.default_rng([self.seed, epoch + 1])
        dealer = np.random.default_rng([self.seed, 0]) if self.fixed else rng
        order = dealer.permutation(n_images)
        if groups is not None:
            order = order[np.argsort(np.asarray(groups)[order], kind="stable")]
        deal = [order[i : i + self.batch_size].tolist() for i in range(0, n_images, self.batch_size)]
        keys = []
        for batch in rng.permutation(len(deal)):
            indices = deal[batch]
            draws = rng.random(1 if self.fixed else len(indices)) < self.flip
            flipped = np.broadcast_to(draws, len(indices)).tolist()
            keys.append(BatchKey(tuple(indices), tuple(flipped)))
        return keys


class Loader:
    """Batches of `dataset`, which may be a subset of the data set that `cache` holds.

    `labels` maps category ids to the detector's labels; ValueError if it lacks one of the data set. With `with_masks`
    the targets carry masks; DatasetError if objects lack one. `pace` is entered while a batch is worked on,
    from its being handed out to the next one's being asked for.
    """

    def __init__(
        self,
        cache: ImageCache,
        dataset: CocoDataset,
        labels: Mapping[int, int],
        plan: BatchPlan,
        with_masks: bool = False,
        pace: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        unknown = [category.id for category in dataset.categories if category.id not in labels]
        if unknown:
            raise ValueError(
                f"expected a label for every category of {dataset.name}, found none for ids {unknown}: "
                "use a detector made for these classes"
            )
        if with_masks and dataset.mask_problem is not None:
            raise DatasetError(dataset.mask_problem)
        self.cache = cache
        self.dataset = dataset
        self.labels = labels
        self.plan = plan
        self.with_masks = with_masks
        self.pace = pace
        self._positions = [cache.position(image.id) for image in dataset.images]
        self._groups = [_shape_group(*cache.size(position)) for position in self._positions]

    def dealt(self, seed: int) -> "Loader":
        """The same images, dealt into other batches and mirrored otherwise."""
        plan = replace(self.plan, seed=seed)
        return Loader(self.cache, self.dataset, self.labels, plan, self.with_masks, self.pace)

    def keys(self, epoch: int) -> list[BatchKey]:
        """The batches of an epoch, images of like shape together."""
        return self.plan.epoch(len(self.dataset), epoch, self._groups)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, for resuming. The next one is loaded in a thread."""
        return self._prefetched(self.keys(epoch)[start:])

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """All images in the data set's order, none mirrored."""
        indices = range(len(self.dataset))
        parts = [tuple(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        return self._prefetched([BatchKey(part, (False,) * len(part)) for part in parts])

    def sample(self, batch_size: int, count: int) -> Iterator[Batch]:
        """Batches of about `count` images drawn at random, the same every time, none mirrored, like shapes together.

        All are of one size, as what averages over them expects, unless there are fewer images than that.
        """
        keys = BatchPlan(batch_size, seed=0, flip=0.0).epoch(len(self.dataset), 0, self._groups)
        full = [key for key in keys if len(key.indices) == batch_size] or keys
        return self._prefetched(full[: -(-count // batch_size)])

    def load(self, key: BatchKey) -> Batch:
        """The batch of a key; the same key gives the same tensors."""
        samples = [self._sample(index, flip) for index, flip in zip(key.indices, key.flipped, strict=True)]
        return Batch(key, [image for image, _ in samples], [target for _, target in samples])

    def _prefetched(self, keys: list[BatchKey]) -> Iterator[Batch]:
        # result() raises in the consumer what load() raised in the thread; leaving the `with` block, also by closing
        # this generator early, ends the thread.
        if not keys:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="autodet-loader") as pool:
            pending = pool.submit(self.load, keys[0])
            for following in keys[1:]:
                batch = pending.result()
                pending = pool.submit(self.load, following)
                with self.pace():
                    yield batch
            batch = pending.result()
            with self.pace():
                yield batch

    def _sample(self, index: int, flip: bool) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.dataset.images[index]
        pixels = self.cache[self._positions[index]]
        image = (pixels.flip(-1) if flip else pixels).to(torch.float32) / 255
        height, width = image.shape[-2:]
        used = record.trainable
        target = {
            "boxes": _scaled_boxes(record, used, height, width, flip),
            "labels": torch.tensor([self.labels[c] for c in record.category_ids[used].tolist()], dtype=torch.int64),
            "image_id": torch.tensor(record.id, dtype=torch.int64),
            "orig_size": torch.tensor([record.height, record.width], dtype=torch.int64),
        }
        if self.with_masks:
            chosen = [found for found, keep in zip(record.segmentations, used, strict=True) if keep]
            masks = resized_masks(chosen, (record.height, record.width), (height, width))
            target["masks"] = masks.flip(-1) if flip else masks
        return image, target


def _scaled_boxes(record: ImageRecord, used: npt.NDArray[np.bool_], height: int, width: int, flip: bool) -> Tensor:
    """float32 N×4 xyxy in pixels of the resized image, of the annotations `used`."""
    scale = np.array([width / record.width, height / record.height] * 2)
    boxes = record.boxes[used].astype(np.float64) * scale
    if flip:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    return torch.from_numpy(boxes.astype(np.float32))


def _shape_group(height: int, width: int) -> int:
    """Images whose aspect ratios lie within a factor of about √2 share a number; portrait is below 0."""
    return round(2 * math.log2(width / height))
