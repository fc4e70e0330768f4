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
from autodet.detectors import Detector, DetectorSpec, build, load_detector, save_detector
from autodet.export import export_onnx
from autodet.joint import Examiner, JointBench, JointTask
from autodet.morphism.settings import with_settings_of
from autodet.pareto import Point
from autodet.records import Metrics, RelativeCost
from autodet.results.joint_report import of_split, write_joint_report
from autodet.search import JointSearch
from autodet.teachers.statistics import measure_statistics
from autodet.working_copy import fetch_changed

DERIVED, ONNX, TABLE = "derived.safetensors", "derived.onnx", "final.json"
SAME = "base, same settings"
PRECISION = 0.005  # of the last timings
CHECKED, ODD = 8, 2  # images on which the ONNX file is checked, of which some may disagree


def finish(
    folder: Path, search: JointSearch, task: JointTask, examiner: Examiner, rounds: int, base_epochs: int | None = None
) -> None:
    """Keep the best detector within the limits, or, where there is none, what comes closest; measure, draw, print.

    rounds: of a timing, at most. base_epochs: that the base was trained here, None where it was given.
    """
    chosen, cost = chosen_of(search, task, examiner, rounds, already_chosen(folder, search))
    student = search.student(chosen.id)
    derived, notes = load_detector(task.weights_file(search.weights[chosen.id]))
    lineage = {"candidate": chosen.id, "lineage_epochs": student.epochs, "val_ap": chosen.ap}
    save_detector(folder / DERIVED, derived, {**notes, **lineage})
    task, base = replace(task, quiet=None), load_detector(folder / BASE)[0]
    detectors, costs, marks = {"base": base}, {"base": examiner.base_cost()}, {}
    spec = with_settings_of(base.spec, derived.spec)
    if spec != base.spec:
        bench = JointBench(task)
        detectors[SAME] = with_settings(base, spec, bench)
        costs[SAME] = examiner.cost(detectors[SAME], PRECISION, rounds)
        marks[SAME] = (search.cost_of(costs[SAME]), bench.bench(spec).measure(detectors[SAME]).ap or 0)
    detectors["derived"], costs["derived"] = derived, cost
    task = replace(task, task=replace(task.task, split=_split(Path(task.task.data))))
    bench, seconds = JointBench(task), json.loads((folder / STAGES).read_text())
    rows = table(detectors, bench, costs, epochs_of(search, chosen.id, base_epochs), seconds)
    save_detections(folder, replace(task.task, teacher=None), {"base": folder / BASE, "derived": folder / DERIVED})
    target = search.settings.limits.get("latency_ratio")
    lines, split = [*doubts(rows), *usage(folder), _export(derived, bench, folder / ONNX)], task.task.split
    found: dict[str, Any] = {"derived": chosen.id, "completed": len(search.weights), "target": target, "rows": rows}
    found |= {"met": search.within(cost), "split": split, "usage": lines, "marks": marks, "seconds": seconds}
    atomic_write_json(folder / TABLE, found)
    report = write_joint_report(folder, chosen.id, rows, target, notes=lines, marks=marks, split=split)
    shown = pd.DataFrame(rows).astype(object)
    print(f"\n{of_split(split)}\n{shown.where(shown.notna(), '–').to_string(index=False)}")
    print("\n" + "\n".join(lines) + f"\n\nReport: {report}")


def already_chosen(folder: Path, search: JointSearch) -> int | None:
    """The candidate that a finished run handed over, unless there are more to choose from by now."""
    fetch_changed(path := folder / TABLE)
    found = json.loads(path.read_text()) if path.exists() else {}
    return int(found["derived"]) if found.get("completed") == len(search.weights) else None


def chosen_of(
    search: JointSearch, task: JointTask, examiner: Examiner, rounds: int, already: int | None = None
) -> tuple[Point, RelativeCost]:
    """What is handed over and its cost, and a word where that is less than was asked for.

    Children were timed before they were trained, and a detector that finds more takes longer: the choice is timed anew.
    already: the candidate that was chosen before and stays, whatever it takes now.
    """
    if not search.front():
        raise ValueError("No candidate completed, not even the base; the causes are in summary.csv.")
    if already is not None:
        point = next(point for point in (*search.ranked(), *search.front()) if point.id == already)
        fetch_changed(path := task.weights_file(search.weights[already]))
        return point, examiner.cost(load_detector(path)[0], PRECISION, rounds) if already else examiner.base_cost()
    for point in search.ranked():
        path = task.weights_file(search.weights[point.id])
        if point.id == 0:
            print("\nNothing better than the base was found; it is handed back as it is. A larger --budget may help.")
            return point, examiner.base_cost()
        fetch_changed(path)  # a child of another machine
        if path.exists():  # of those that have left the front there is none
            cost = examiner.cost(load_detector(path)[0], PRECISION, rounds)
            if search.within(cost):
                return point, cost
            now = f"{cost.latency_ratio:.1%} of the base's latency, {cost.macs_g:.3g} GMACs, {cost.params_m:.3g} M"
            print(f"Candidate {point.id} (AP {point.ap:.3f}) is beyond the limits now that it is trained: {now}.")
    print(f"\nNo candidate is within the limits {dict(search.settings.limits)}: what comes closest is kept.")
    best = min(search.front(), key=lambda point: (excess(search, point), -point.ap))
    return best, examiner.cost(load_detector(task.weights_file(search.weights[best.id]))[0], PRECISION, rounds)


def excess(search: JointSearch, point: Point) -> float:
    """How far a candidate is beyond the limits: its cost as a multiple of the limit that it misses most, at least 1.

    The base misses a latency limit by less than anything slower does.
    """
    cost = search.student(point.id).cost
    return max(1.0, *(float(getattr(cost, name)) / limit for name, limit in search.settings.limits.items()))


def doubts(rows: list[dict[str, Any]]) -> list[str]:
    """What a user should know before the derived detector replaces the base: it may have been chosen by luck."""
    base, derived = rows[0]["AP"] or 0.0, rows[-1]["AP"] or 0.0
    if derived >= base:
        return []
    return [
        f"On these images the derived detector is less accurate than the base (AP {derived} against {base}): "
        "a limit too strict to be met without a loss, or luck on the images that it was chosen by. More children "
        "(--resume with a larger --budget), or a larger val split, may help.",
        "",
    ]


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
    costs: dict[str, RelativeCost],
    epochs: dict[str, str],
    seconds: dict[str, float],
) -> list[dict[str, Any]]:
    """A row a detector: AP in points on the task's split, and what it costs.

    seconds: of the stages; the base took its own, the derived detector all of them.
    """
    spent = {"base": seconds.get("base", 0.0), "derived": sum(seconds.values())}
    rows = []
    for name, detector in detectors.items():
        detector.model.to(bench.task.task.device).eval()
        metrics = bench.bench(detector.spec).measure(detector)
        rows.append(
            {
                "detector": name,
                **_points(metrics),
                "latency ms": round(costs[name].latency_ms, 2),
                "of base": round(costs[name].latency_ratio, 3),
                "MACs G": round(costs[name].macs_g, 3),
                "params M": round(costs[name].params_m, 3),
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
        images = next(iter(bench.bench(detector.spec).eval_loader.eval_batches(CHECKED))).images
        check = export_onnx(detector, path, images, odd=ODD)
    except Exception as error:  # an exporter's own errors are of many kinds, and all else is there without the file
        return f"ONNX: not written: {error}"
    same = f"the same {check.detections} detections on {check.images} images in ONNX Runtime"
    odd = f" (on {check.odd} more, rounding decides otherwise at a threshold)" if check.odd else ""
    return f"ONNX: {path.resolve()}, {same}{odd}"


def _points(metrics: Metrics) -> dict[str, float | None]:
    names = {"AP": "ap", "AP50": "ap50", "AP S": "ap_small", "AP M": "ap_medium", "AP L": "ap_large"}
    values = metrics.to_json()
    names |= {"mask AP": "mask_ap", "mask AP50": "mask_ap50"} if "mask_ap" in values else {}
    return {
        title: None if values[name] is None else round(100 * float(values[name] or 0), 2)
        for title, name in names.items()
    }


def _split(data: Path) -> Any:
    """The test split where the data has one, which nothing was chosen by."""
    return "test" if "test" in read_dataset(data) else "val"
