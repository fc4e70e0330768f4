"""All images of a data set, decoded and resized once, in one memory-mapped file that the workers of a machine share.

The file's name carries the sha256 of the image files' bytes, the size limits and VERSION, so a changed image leads to
another file and a stale cache cannot be opened. Files of data no longer in use stay until the folder is deleted.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from autodet.atomic import atomic_write_bytes, atomic_write_json
from autodet.data.checks import IMAGE_ERRORS, DatasetError, Problems
from autodet.data.coco import CocoDataset, ImageRecord
from autodet.data.lock import file_lock

log = logging.getLogger(__name__)

VERSION = 1  # raise when decoding or resizing changes
THREADS = min(8, os.cpu_count() or 1)
# A file changed twice within the clock's grain keeps its time stamp. Only older files' hashes are remembered.
SETTLED_NS = 2_000_000_000


class ImageCache:
    """uint8 images 3×H×W of `dataset`, resized to `min_size` and `max_size` (pixels) by torchvision's rule.

    Building takes a lock: of two processes that need the same cache one builds it and the other waits. Raises
    DatasetError listing every image that cannot be decoded.
    """

    def __init__(self, dataset: CocoDataset, min_size: int, max_size: int, directory: Path) -> None:
        if not 0 < min_size <= max_size:
            raise ValueError(f"expected 0 < min_size ≤ max_size, found {min_size} and {max_size}")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.dataset = dataset
        self._sizes = [resized_size(image.height, image.width, min_size, max_size) for image in dataset.images]
        ends = np.cumsum([3 * height * width for height, width in self._sizes], dtype=np.int64)
        self._offsets: list[int] = [0, *ends.tolist()]
        self._positions = {image.id: position for position, image in enumerate(dataset.images)}

        hashes = file_hashes([image.path for image in dataset.images], directory)
        self.content_hash = _sha256_of_text([dataset.annotations_hash, *hashes])
        """sha256 over annotations and image files."""
        key = _sha256_of_text([f"v{VERSION} {min_size} {max_size}", *hashes])[:32]
        self.path = directory / f"{key}.bin"
        if not self._is_complete():
            with file_lock(directory / f"{key}.lock"):
                if not self._is_complete():  # another process may have built it while this one waited
                    self._build()
        # Mode "c" is copy-on-write: the pages are shared, and a caller who writes to a tensor does not reach the file.
        self._pixels = torch.from_numpy(np.memmap(self.path, dtype=np.uint8, mode="c"))

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, i: int) -> Tensor:
        """uint8 3×H×W, a view into the mapped file."""
        height, width = self._sizes[i]
        return self._pixels[self._offsets[i] : self._offsets[i + 1]].view(3, height, width)

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of the cached image in pixels."""
        return self._sizes[i]

    def position(self, image_id: int) -> int:
        """Index of the image with this COCO id; KeyError if the cached data set lacks it."""
        return self._positions[image_id]

    def _index(self) -> str:
        """What the JSON beside the pixels says; written last, so its presence shows that the pixels are complete."""
        sizes = [list(size) for size in self._sizes]
        return json.dumps({"version": VERSION, "bytes": self._offsets[-1], "offsets": self._offsets, "sizes": sizes})

    def _is_complete(self) -> bool:
        try:
            index = self.path.with_suffix(".json").read_text(encoding="utf-8")
            return self.path.stat().st_size == self._offsets[-1] and index == self._index()
        except (FileNotFoundError, UnicodeDecodeError):
            return False

    def _build(self) -> None:
        """Write pixels beside their final place, then move them there. A killed builder leaves a file that the next
        one overwrites."""
        start = time.monotonic()
        log.info("decoding %d images of %s into %s", len(self), self.dataset.name, self.path)
        partial = self.path.with_suffix(".bin.partial")
        with partial.open("wb") as file, ThreadPoolExecutor(THREADS) as pool:
            work = zip(self.dataset.images, self._sizes, self._offsets, strict=False)
            jobs = [pool.submit(_write_image, file.fileno(), *arguments) for arguments in work]
            failures = [job.result() for job in jobs]
            os.fsync(file.fileno())
        problems = Problems(self.dataset.images[0].path.parent)
        for failure in filter(None, failures):
            problems.add(*failure)
        if problems:
            partial.unlink()
            raise DatasetError(problems.message())
        os.replace(partial, self.path)
        atomic_write_bytes(self.path.with_suffix(".json"), self._index().encode())
        log.info("decoded %d images in %.1f s", len(self), time.monotonic() - start)


def resized_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) after torchvision's GeneralizedRCNNTransform: the shorter side becomes min_size unless the
    longer would exceed max_size; the other side is rounded down.

    In integers, so that the leading side is exact and the transform leaves a cached image's size alone; its own
    floating-point product may fall a pixel short.
    """
    short, long = min(height, width), max(height, width)
    numerator, denominator = (min_size, short) if min_size * long <= max_size * short else (max_size, long)
    return max(1, height * numerator // denominator), max(1, width * numerator // denominator)


def decode(path: Path) -> Image.Image:
    """RGB image with the EXIF orientation applied; grey, palette, CMYK, alpha and 16-bit images are converted.

    Raises one of IMAGE_ERRORS if the file is missing, truncated, or no image.
    """
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16-bit grey, also where PIL holds it in 32 bits; convert() would clip at 255
            high_bytes = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
            image = Image.fromarray(high_bytes.astype(np.uint8))
        return image.convert("RGB")


def _write_image(file: int, record: ImageRecord, size: tuple[int, int], offset: int) -> tuple[Path, str, str] | None:
    """Put one image at its place; the problem (file, kind, what), if it cannot be decoded."""
    try:
        image = decode(record.path)
    except IMAGE_ERRORS as error:
        return record.path, "unreadable image", f"image {record.id}: {type(error).__name__}: {error}"
    if image.size != (record.width, record.height):
        what = f"image {record.id}: {record.width}×{record.height}, file {image.width}×{image.height}"
        return record.path, "size differs from the file", what
    pixels = _resized(image, size)
    written = os.pwrite(file, pixels.tobytes(), offset)
    if written != pixels.nbytes:
        raise OSError(f"expected to write {pixels.nbytes} bytes of the image cache, wrote {written}: is the disk full?")
    return None


def _resized(image: Image.Image, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """3×H×W; size: height, width. Antialiased, unlike torchvision's."""
    resized = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def read_resized(path: Path, min_size: int, max_size: int) -> Tensor:
    """One image, uint8 3×H×W, as a cache of these sizes holds it. Raises one of IMAGE_ERRORS as ``decode`` does."""
    image = decode(path)
    return torch.from_numpy(_resized(image, resized_size(image.height, image.width, min_size, max_size)))


def file_hashes(paths: Sequence[Path], directory: Path) -> list[str]:
    """sha256 of every file's bytes. Hashes are remembered in `directory` by path, size and times of change."""
    memo_path = directory / "image-hashes.json"
    try:
        memo = json.loads(memo_path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        memo = {}
    now = time.time_ns()
    fresh = {}

    def hash_of(path: Path) -> str:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        name = str(path.resolve())
        known = memo.get(name)
        if known is not None and known[:-1] == stamp:
            return str(known[-1])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if now - max(stamp[1:]) > SETTLED_NS:
            fresh[name] = [*stamp, digest]
        return digest

    with ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(hash_of, paths))
    if fresh:
        atomic_write_json(memo_path, {**memo, **fresh})
    return hashes


def _sha256_of_text(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
