"""How good and how expensive a detector is: COCO AP of boxes and masks, latency, multiply-adds, parameters."""

from autodet.evaluation.coco_ap import (
    Detection,
    DetectionError,
    evaluate,
    evaluate_detections,
    per_category_ap,
    to_original,
)
from autodet.evaluation.cost import (
    Latency,
    LatencyRatio,
    cost_of,
    count_macs,
    count_params,
    device_name,
    measure_latencies_interleaved,
    measure_latency,
    measure_latency_ratio,
)
from autodet.evaluation.masks import binary_masks, encoded_masks
from autodet.evaluation.quiet import Quiet

__all__ = [
    "Detection",
    "DetectionError",
    "Latency",
    "LatencyRatio",
    "Quiet",
    "binary_masks",
    "cost_of",
    "count_macs",
    "count_params",
    "device_name",
    "encoded_masks",
    "evaluate",
    "evaluate_detections",
    "measure_latencies_interleaved",
    "measure_latency",
    "measure_latency_ratio",
    "per_category_ap",
    "to_original",
]
