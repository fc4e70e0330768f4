"""What a run records: metrics, costs, events, and the records that the events add up to.

Values only; nothing here touches a disk. `autodet.ledger` stores events, `autodet.results` shows records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

Kind = Literal["asked", "reported", "told"]
Status = Literal["running", "completed", "stopped", "failed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FINAL_STATUSES = ("completed", "stopped", "failed")


@dataclass(frozen=True)
class Metrics:
    """The twelve numbers of the COCO evaluation of boxes, and six of masks, 0–1.

    None where the ground truth has nothing of that size; those of masks also where none were measured.
    """

    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    ar1: float | None = None
    ar10: float | None = None
    ar100: float | None = None
    ar_small: float | None = None
    ar_medium: float | None = None
    ar_large: float | None = None
    mask_ap: float | None = None
    mask_ap50: float | None = None
    mask_ap75: float | None = None
    mask_ap_small: float | None = None
    mask_ap_medium: float | None = None
    mask_ap_large: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """Field names to numbers; those of masks only where masks were measured."""
        names = METRIC_NAMES if self.mask_ap is None else METRIC_NAMES + MASK_METRIC_NAMES
        return {name: getattr(self, name) for name in names}

    def with_masks(self, masks: Metrics) -> Metrics:
        """These numbers of boxes beside those of masks, which are given as the twelve numbers of an evaluation."""
        return replace(self, **{name: getattr(masks, name.removeprefix(MASK)) for name in MASK_METRIC_NAMES})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Metrics:
        """The reverse of `to_json`; keys that are missing become None, keys unknown here are ignored."""
        return cls(**{name: data.get(name) for name in METRIC_NAMES + MASK_METRIC_NAMES})


MASK = "mask_"
METRIC_NAMES: tuple[str, ...] = tuple(f.name for f in fields(Metrics) if not f.name.startswith(MASK))  # of boxes
MASK_METRIC_NAMES: tuple[str, ...] = tuple(f.name for f in fields(Metrics) if f.name.startswith(MASK))


@dataclass(frozen=True)
class Cost:
    """What one detection costs: the whole detector with post-processing.

    latency_ms: median, latency_p90_ms: 90th percentile, in milliseconds for one batch of `batch` images on `device`
    with `threads` CPU threads; macs_g: multiply-adds in 10⁹ for one image; params_m: parameters in 10⁶.
    """

    latency_ms: float
    latency_p90_ms: float
    device: str
    threads: int
    batch: int
    macs_g: float
    params_m: float

    def to_json(self) -> dict[str, Any]:
        """Field names to values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cost:
        """The reverse of `to_json`."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class RelativeCost:
    """What a detector costs beside the base of its search.

    latency_ratio: of their times for one image, measured by turns: the median over rounds; latency_spread: its standard
    error; latency_ms: the ratio times the base's milliseconds; macs_g: multiply-adds in 10⁹; params_m: parameters in
    10⁶.
    """

    latency_ratio: float
    latency_spread: float
    latency_ms: float
    macs_g: float
    params_m: float

    def to_json(self) -> dict[str, float]:
        """Field names to values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, float]) -> RelativeCost:
        """The reverse of `to_json`."""
        return cls(**{f.name: float(data[f.name]) for f in fields(cls)})


@dataclass(frozen=True)
class Event:
    """One immutable fact of a run.

    number: place in the run's sequence, from 0; id: the candidate's number, from 0; time: unix seconds.
    asked: a candidate was proposed, before anything trains; reported: an epoch ended; told: its result.
    """

    number: int
    kind: Kind
    id: int
    time: float
    payload: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Record:
    """One candidate of a run, as far as the events tell.

    ap: fitness, 0–1, None while running or failed; epochs and seconds: spent so far; ap_by_epoch: (epochs done, AP) of
    every report, in order of epoch; asked_at, told_at: unix seconds; weights: sha256 of the stored weights;
    rejected: (formula, reason) of proposals that were turned down before this one; student: of a joint search, the
    candidate's `Student` as JSON values.
    """

    id: int
    formula: str
    inherit: bool
    replicate: int
    phase: str
    group: str
    generation: int
    parents: tuple[int, ...]
    origin: str
    status: Status
    ap: float | None
    metrics: Metrics | None
    epochs: int
    seconds: float
    cause: str | None
    seed: int | None
    weights: str | None
    asked_at: float
    told_at: float | None
    ap_by_epoch: tuple[tuple[int, float | None], ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    student: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def mask_ap(self) -> float | None:
        """AP of masks, 0–1; None where none was measured. `ap`, of boxes, is what a search goes by."""
        return None if self.metrics is None else self.metrics.mask_ap

    def to_json(self) -> dict[str, Any]:
        """One line of records.jsonl."""
        return asdict(self) | {"metrics": None if self.metrics is None else self.metrics.to_json()}

    def row(self) -> dict[str, str | int | float | bool | None]:
        """One flat row of summary.csv: metrics as columns, parents as text, plain values of `extra` as `extra.NAME`.

        `ap` is the fitness; the evaluation's own AP appears as `extra.metrics_ap` only where it differs.
        """
        names = ("id", "phase", "group", "generation", "formula", "inherit", "replicate", "origin", "status", "ap")
        row: dict[str, Any] = {name: getattr(self, name) for name in names}
        metrics = (self.metrics or Metrics()).to_json()
        measured = metrics.pop("ap")
        row |= metrics
        for name in ("epochs", "seconds", "cause", "seed", "weights", "asked_at", "told_at"):
            row[name] = getattr(self, name)
        row["rejected"] = len(self.rejected)
        row["parents"] = " ".join(map(str, self.parents))
        if measured is not None and measured != self.ap:
            row["extra.metrics_ap"] = measured
        row |= _student_columns(self.student)
        plain = {k: v for k, v in self.extra.items() if v is None or isinstance(v, (bool, int, float, str))}
        return row | {f"extra.{key}": value for key, value in plain.items()}


def _student_columns(student: Mapping[str, Any] | None) -> dict[str, Any]:
    """A derived student's columns of summary.csv; none for other candidates."""
    if student is None:
        return {}
    names = {"spec": "student", "actions": "actions", "teacher": "teacher", "epochs": "lineage_epochs"}
    return {column: student[name] for name, column in names.items()} | dict(student["cost"])


def check_payload(kind: str, payload: Mapping[str, Any]) -> None:
    """Raise ValueError when `payload` lacks what the fold over events needs."""
    if kind == "asked":
        candidate = payload.get("candidate")
        _require(isinstance(candidate, Mapping), "asked: expected 'candidate' with 'formula'", payload)
        assert isinstance(candidate, Mapping)
        _require(
            isinstance(candidate.get("formula"), str), "asked: expected the candidate's 'formula' as text", payload
        )
    elif kind == "reported":
        epoch = payload.get("epoch")
        _require(type(epoch) is int and epoch >= 0, "reported: expected 'epoch', epochs done so far (0, 1, …)", payload)
    elif kind == "told":
        expected = f"told: expected 'status' of {', '.join(FINAL_STATUSES)}"
        _require(payload.get("status") in FINAL_STATUSES, expected, payload)
        _require(
            payload["status"] != "completed" or payload.get("ap") is not None, "told: completed needs 'ap'", payload
        )
    else:
        raise ValueError(f"expected an event of kind {', '.join(KINDS)}, found {kind!r}; use one of these")


def _require(condition: bool, expectation: str, payload: Mapping[str, Any]) -> None:
    if not condition:
        raise ValueError(f"{expectation}, found {dict(payload)!r}; correct the caller")


def records_from(events: Iterable[Event]) -> list[Record]:
    """Fold a run's events, in their order, into one record per candidate, in order of id. Pure."""
    records: dict[int, Record] = {}
    for event in events:
        if event.kind == "asked":
            records[event.id] = _asked(event)
        elif event.kind == "reported":
            records[event.id] = _reported(records[event.id], event)
        else:
            records[event.id] = _told(records[event.id], event)
    return [records[id] for id in sorted(records)]


def _asked(event: Event) -> Record:
    payload = event.payload
    candidate = payload["candidate"]
    return Record(
        id=event.id,
        formula=candidate["formula"],
        inherit=bool(candidate.get("inherit", False)),
        replicate=int(candidate.get("replicate", 0)),
        phase=str(payload.get("phase", "")),
        group=str(payload.get("group", "")),
        generation=int(payload.get("generation", 0)),
        parents=tuple(payload.get("parents", ())),
        origin=str(payload.get("origin", "")),
        status="running",
        ap=None,
        metrics=None,
        epochs=0,
        seconds=0.0,
        cause=None,
        seed=None,
        weights=None,
        asked_at=event.time,
        told_at=None,
        rejected=tuple((str(formula), str(reason)) for formula, reason in payload.get("rejected", ())),
        student=candidate.get("student"),
    )


def _reported(record: Record, event: Event) -> Record:
    epoch = int(event.payload["epoch"])
    curve = tuple(sorted((*record.ap_by_epoch, (epoch, event.payload.get("ap"))), key=lambda point: point[0]))
    seconds = max(record.seconds, float(event.payload.get("seconds") or 0.0))
    return replace(record, ap_by_epoch=curve, epochs=max(record.epochs, epoch), seconds=seconds)


def _told(record: Record, event: Event) -> Record:
    payload = event.payload
    metrics, epochs, seconds = payload.get("metrics"), payload.get("epochs"), payload.get("seconds")
    return replace(
        record,
        status=payload["status"],
        ap=payload.get("ap"),
        metrics=None if metrics is None else Metrics.from_json(metrics),
        epochs=record.epochs if epochs is None else int(epochs),
        seconds=record.seconds if seconds is None else float(seconds),
        cause=payload.get("cause"),
        seed=payload.get("seed"),
        weights=payload.get("weights"),
        told_at=event.time,
        extra=dict(payload.get("extra") or {}),
    )
