"""What a finished upgrade leaves: the derived detector, its ONNX file, the table beside the base, the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from pictures import save_detections
from upgrading import BASE, STAGES

from autodet.atomic import atomic_write_json
from autodet.data import read_dataset
from autodet.detectors import Detector, DetectorSpec, build, detect, load_detector, save_detector
from autodet.evaluation import count_macs, count_params, measure_latencies_interleaved
from autodet.export import export_onnx
from autodet.joint import Examiner, JointBench, JointTask
from autodet.morphism.settings import with_settings_of
from autodet.pareto import Point
from autodet.records import Metrics
from autodet.results.joint_report import write_joint_report
from autodet.search import JointSearch
from autodet.teachers.statistics import measure_statistics

DERIVED, ONNX, TABLE = "derived.safetensors", "derived.onnx", "final.json"
SAME = "base, same settings"
REPEATS = 40  # rounds of the last timing


def finish(
    folder: Path, search: JointSearch, task: JointTask, examiner: Examiner, base_epochs: int | None = None
) -> None:
    """Keep the best detector within the limits, or, where there is none, the best of all; measure, draw, print.

    base_epochs: that the base was trained here, None where it was given.
    """
    chosen = chosen_of(search, folder)
    student = search.student(chosen.id)
    derived, notes = load_detector(task.weights_file(search.weights[chosen.id]))
    lineage = {"candidate": chosen.id, "lineage_epochs": student.epochs, "val_ap": chosen.ap}
    save_detector(folder / DERIVED, derived, {**notes, **lineage})
    task, base = replace(task, quiet=None), load_detector(folder / BASE)[0]
    detectors, marks, spec = {"base": base}, {}, with_settings_of(base.spec, derived.spec)
    if spec != base.spec:
        bench = JointBench(task)
        detectors[SAME] = with_settings(base, spec, bench)
        cost = float(getattr(examiner.cost(detectors[SAME]), search.settings.cost))
        marks[SAME] = (cost, bench.bench(spec).measure(detectors[SAME]).ap or 0)
    detectors["derived"] = derived
    task = replace(task, task=replace(task.task, split=_split(Path(task.task.data))))
    bench, seconds = JointBench(task), json.loads((folder / STAGES).read_text())
    rows = table(detectors, bench, examiner, epochs_of(search, chosen.id, base_epochs), seconds)
    save_detections(folder, replace(task.task, teacher=None), {"base": folder / BASE, "derived": folder / DERIVED})
    target, lines = (
        search.settings.limits.get("latency_ratio"),
        [*usage(folder), _export(derived, bench, folder / ONNX)],
    )
    found = {"derived": chosen.id, "target": target, "rows": rows, "split": task.task.split, "usage": lines}
    atomic_write_json(folder / TABLE, found | {"marks": marks, "seconds": seconds})
    report = write_joint_report(folder, chosen.id, rows, target, notes=lines, marks=marks)
    shown = pd.DataFrame(rows).astype(object)
    print(f"\nOn the {task.task.split} split:\n{shown.where(shown.notna(), '–').to_string(index=False)}")
    print("\n" + "\n".join(lines) + f"\n\nReport: {report}")


def chosen_of(search: JointSearch, folder: Path) -> Point:
    """What is handed over, and a word where that is less than was asked for."""
    if not search.front():
        raise ValueError(f"No candidate completed, not even the base; the causes are in {folder / 'summary.csv'}.")
    best = search.best()
    if best is None:
        print(f"\nNo candidate is within the limits {dict(search.settings.limits)}: the most accurate is kept.")
        return max(search.front(), key=lambda point: point.ap)
    if best.id == 0:
        print("\nNothing better than the base was found; it is handed back as it is. A larger --budget may help.")
    return best


def with_settings(base: Detector, spec: DetectorSpec, bench: JointBench) -> Detector:
    """The base with other settings, and norm statistics for its image size."""
    child = build(spec)
    child.model.load_state_dict(base.model.state_dict())
    child.model.to(bench.task.task.device)
    if spec.min_size != base.spec.min_size:
        measure_statistics(child, bench.bench(spec).train_loader)
    child.model.eval()
    return child


def epochs_of(search: JointSearch, derived: int, base: int | None) -> dict[str, str]:
    """How long each detector was trained in all, as ``16 + 9``: as the base, or in the pool, and by the search."""
    student, own = search.student(derived), "given" if base is None else str(base)
    first, searched = student, 0
    while first.parent is not None:
        searched += search.settings.epochs
        first = search.student(first.parent)
    before = f"{first.epochs} in the pool" if first.epochs else own
    fresh = not search.settings.inherit and student.parent is not None
    found = str(search.settings.epochs) if fresh else before + (f" + {searched}" if searched else "")
    return {"base": own, SAME: own, "derived": found}


def table(
    detectors: dict[str, Detector],
    bench: JointBench,
    examiner: Examiner,
    epochs: dict[str, str],
    seconds: dict[str, float],
) -> list[dict[str, Any]]:
    """A row a detector: AP in points, costs timed by turns now that nothing else runs, or by the user's measurement.

    seconds: of the stages; the base took its own, the derived detector all of them.
    """
    spent = {"base": seconds.get("base", 0.0), "derived": sum(seconds.values())}
    task = bench.task.task
    images = {name: bench.image(detector.spec) for name, detector in detectors.items()}
    for detector in detectors.values():
        detector.model.to(task.device).eval()
    runs = {name: lambda d=detector, i=images[name]: detect(d, i) for name, detector in detectors.items()}
    if examiner.by_user:
        took = {name: examiner.cost(detector).latency_ms for name, detector in detectors.items()}
    else:
        latencies = measure_latencies_interleaved(runs, task.device, repeats=REPEATS, threads=task.threads)
        took = {name: latency.median_ms for name, latency in latencies.items()}
    rows = []
    for name, detector in detectors.items():
        metrics = bench.bench(detector.spec).measure(detector)
        rows.append(
            {
                "detector": name,
                **_points(metrics),
                "latency ms": round(took[name], 2),
                "of base": round(took[name] / took["base"], 3),
                "MACs G": round(count_macs(runs[name]), 3),
                "params M": round(count_params(detector.model), 3),
                "epochs": epochs[name],
                "minutes of this run": round(spent[name] / 60, 1) if name in spent else None,
            }
        )
    return rows


def usage(folder: Path) -> list[str]:
    """How the derived detector is used, as lines of text."""
    path = (folder / DERIVED).resolve()
    return [
        f"python experiments/predict.py {path} IMAGE --output .",
        "",
        "from autodet import detect, load_detector",
        f'detector, notes = load_detector("{path}")',
        "found = detect(detector, [image])  # image: 3×H×W in [0, 1]; boxes in its pixels, scores, labels",
        "",
    ]


def _export(detector: Detector, bench: JointBench, path: Path) -> str:
    """A line on the checked ONNX file, or why there is none. Of a former one nothing is left."""
    path.unlink(missing_ok=True)
    detector.model.to("cpu")
    try:
        check = export_onnx(detector, path, next(iter(bench.bench(detector.spec).eval_loader.eval_batches(4))).images)
    except Exception as error:  # an exporter's own errors are of many kinds, and all else is there without the file
        return f"ONNX: not written: {error}"
    return f"ONNX: {path.resolve()}, the same {check.detections} detections on {check.images} images in ONNX Runtime"


def _points(metrics: Metrics) -> dict[str, float | None]:
    names = {"AP": "ap", "AP50": "ap50", "AP S": "ap_small", "AP M": "ap_medium", "AP L": "ap_large"}
    values = metrics.to_json()
    return {
        title: None if values[name] is None else round(100 * float(values[name] or 0), 2)
        for title, name in names.items()
    }


def _split(data: Path) -> Any:
    """The test split where the data has one, which nothing was chosen by."""
    return "test" if "test" in read_dataset(data) else "val"
