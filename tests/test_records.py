import pytest

from autodet.records import MASK_METRIC_NAMES, METRIC_NAMES, Cost, Event, Metrics, Record, check_payload, records_from

CANDIDATE = {"formula": "global: l1 * 2", "inherit": True, "replicate": 1}
EVENTS = [
    Event(0, "asked", 0, 10.0, {"candidate": CANDIDATE, "phase": "divide", "group": "global", "generation": 2}),
    Event(1, "asked", 1, 11.0, {"candidate": {"formula": "none"}, "parents": [0], "rejected": [["x", "not finite"]]}),
    Event(2, "reported", 0, 12.0, {"epoch": 2, "ap": 0.3, "seconds": 9.0}),
    Event(3, "reported", 0, 13.0, {"epoch": 1, "ap": 0.2, "seconds": 4.0}),
    Event(4, "told", 0, 14.0, {"status": "completed", "ap": 0.4, "metrics": {"ap": 0.4, "ap50": 0.7}, "epochs": 3}),
    Event(5, "reported", 1, 15.0, {"epoch": 1, "ap": None}),
]


def test_fold_equals_what_a_person_reads_off_the_events() -> None:
    assert records_from(EVENTS) == [
        Record(
            id=0,
            formula="global: l1 * 2",
            inherit=True,
            replicate=1,
            phase="divide",
            group="global",
            generation=2,
            parents=(),
            origin="",
            status="completed",
            ap=0.4,
            metrics=Metrics(ap=0.4, ap50=0.7),
            epochs=3,
            seconds=9.0,
            cause=None,
            seed=None,
            weights=None,
            asked_at=10.0,
            told_at=14.0,
            ap_by_epoch=((1, 0.2), (2, 0.3)),
        ),
        Record(
            id=1,
            formula="none",
            inherit=False,
            replicate=0,
            phase="",
            group="",
            generation=0,
            parents=(0,),
            origin="",
            status="running",
            ap=None,
            metrics=None,
            epochs=1,
            seconds=0.0,
            cause=None,
            seed=None,
            weights=None,
            asked_at=11.0,
            told_at=None,
            ap_by_epoch=((1, None),),
            rejected=(("x", "not finite"),),
        ),
    ]


def test_fold_of_every_beginning_is_defined() -> None:
    counts = [len(records_from(EVENTS[:n])) for n in range(len(EVENTS) + 1)]
    assert counts == [0, 1, 2, 2, 2, 2, 2]


def test_failure_keeps_its_cause() -> None:
    told = {"status": "failed", "ap": None, "metrics": None, "epochs": 0, "seconds": 1.5, "cause": "loss is NaN"}
    (record,) = records_from([EVENTS[0], Event(1, "told", 0, 20.0, {**told, "seed": 7, "extra": {"scale": 2.0}})])
    assert (record.status, record.ap, record.cause, record.seed) == ("failed", None, "loss is NaN", 7)
    assert record.row()["extra.scale"] == 2.0 and record.row()["seconds"] == 1.5


def test_row_is_flat_and_shows_a_measurement_that_differs_from_the_fitness() -> None:
    told = {"status": "completed", "ap": 0.5, "metrics": {"ap": 0.4, "ap75": 0.1}}
    row = records_from([EVENTS[0], Event(1, "told", 0, 20.0, told)])[0].row()
    assert row["ap"] == 0.5 and row["ap75"] == 0.1 and row["extra.metrics_ap"] == 0.4
    assert all(value is None or isinstance(value, (str, int, float, bool)) for value in row.values())


def test_metrics_and_cost_round_trip() -> None:
    metrics = Metrics(ap=0.25, ap50=0.5, ap_small=None, ar100=1.0)
    assert Metrics.from_json({**metrics.to_json(), "unknown": 1}) == metrics
    cost = Cost(1.5, 2.0, "cpu", 2, 1, 3.25, 1.4)
    assert Cost.from_json(cost.to_json()) == cost


def test_numbers_of_masks_are_written_only_where_there_are_some() -> None:
    boxes = Metrics(ap=0.25, ap50=0.5, ar1=0.125)
    assert set(boxes.to_json()) == set(METRIC_NAMES) and not any("mask" in name for name in METRIC_NAMES)
    assert len(METRIC_NAMES) == 12 and len(MASK_METRIC_NAMES) == 6
    both = boxes.with_masks(Metrics(ap=0.2, ap50=0.4, ap75=0.3, ap_large=0.1, ar1=0.9))
    assert (both.ap, both.ap50, both.ar1) == (0.25, 0.5, 0.125)
    assert (both.mask_ap, both.mask_ap50, both.mask_ap75, both.mask_ap_large) == (0.2, 0.4, 0.3, 0.1)
    assert both.mask_ap_small is None and both.to_json()["mask_ap75"] == 0.3
    assert Metrics.from_json(both.to_json()) == both
    old = {"ap": 0.25, "ap50": 0.5, "ar1": 0.125}  # as before masks were known
    assert Metrics.from_json(old) == boxes


def test_a_row_shows_masks_beside_boxes_and_the_fitness_is_the_boxes() -> None:
    told = {"status": "completed", "ap": 0.4, "metrics": {"ap": 0.4, "mask_ap": 0.3, "mask_ap50": 0.6}}
    record = records_from([EVENTS[0], Event(1, "told", 0, 20.0, told)])[0]
    row = record.row()
    assert (record.ap, record.mask_ap, row["ap"], row["mask_ap"], row["mask_ap50"]) == (0.4, 0.3, 0.4, 0.3, 0.6)
    assert "extra.metrics_ap" not in row
    plain = records_from([EVENTS[0]])[0]
    assert plain.mask_ap is None and not any(name.startswith("mask") for name in plain.row())
    assert record.to_json()["metrics"]["mask_ap"] == 0.3


@pytest.mark.parametrize(
    ("kind", "payload", "message"),
    [
        ("asked", {}, "formula"),
        ("asked", {"candidate": {"formula": 3}}, "formula"),
        ("reported", {"epoch": 1.5}, "epoch"),
        ("reported", {"epoch": -1}, "epoch"),
        ("told", {"status": "running"}, "completed, stopped, failed"),
        ("told", {"status": "completed", "ap": None}, "ap"),
        ("lost", {}, "asked, reported, told"),
    ],
)
def test_payload_that_cannot_be_folded_is_refused(kind: str, payload: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_payload(kind, payload)
