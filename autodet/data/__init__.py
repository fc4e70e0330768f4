"""COCO-format data: read and checked, decoded once into a shared cache, dealt in reproducible batches."""

from autodet.data.cache import ImageCache, read_resized
from autodet.data.checks import DatasetError
from autodet.data.coco import Category, CocoDataset, ImageRecord, label_of, read_dataset
from autodet.data.loader import Batch, BatchKey, BatchPlan, Loader
from autodet.data.shapes import write_shapes

__all__ = [
    "Batch",
    "BatchKey",
    "BatchPlan",
    "Category",
    "CocoDataset",
    "DatasetError",
    "ImageCache",
    "ImageRecord",
    "Loader",
    "label_of",
    "read_dataset",
    "read_resized",
    "write_shapes",
]
