"""A table: written and read, replayed as if it were training, and refused with a clear message."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import stdev

import pytest
from search_tables import CHECKS, EPOCHS, SMALL, made_ap, made_table, records

from autodet.distill.formula import Formula
from autodet.search import (
    Candidate,
    Rules,
    StopRule,
    Table,
    TableError,
    random_search,
    read_table,
    run_serial,
    write_table,
)
from autodet.search.tabular import by_hash


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


def test_what_was_written_is_read(path: Path) -> None:
    table = made_table(path, replicated=3, failing="l1")
    assert table.provenance["data"] == "made" and table.grid == SMALL
    assert len(table.rows) == 34 + 2 * 3 and len(table.aps) == 34
    for record, row in zip(records(SMALL, replicated=3, failing="l1"), table.rows, strict=True):
        assert (record.formula, record.replicate, record.status) == (row.formula, row.replicate, row.status)
        assert (record.ap, record.ap_by_epoch, record.epochs) == (row.ap, row.curve, row.epochs)
        assert row.seconds == 12.5
    header = path.read_text().splitlines()[1]
    assert header == "formula,replicate,status,ap,ap@2,ap@4,epochs,seconds"


def test_best_and_thresholds_are_those_of_the_sorted_aps(path: Path) -> None:
    table = made_table(path)
    aps = sorted((round(made_ap(f, 0, 0.004), 6) for f in SMALL.formulas()), reverse=True)
    assert table.best == aps[0] == table.threshold(0.01)  # 1 % of 34 is less than one: at least one
    assert table.threshold(0.1) == aps[2] and table.threshold(0.5) == aps[16] and table.threshold(1.0) == aps[-1]


def test_failures_count_as_formulas_and_are_never_good(path: Path) -> None:
    table = made_table(path, failing="l1")
    known = sorted((ap for ap in table.aps.values() if ap is not None), reverse=True)
    assert len(known) < 34
    assert table.threshold(0.1) == known[2] and table.threshold(1.0) == known[-1]
    with pytest.raises(TableError, match="a completed training"):
        made_table(path, failing=":").threshold()


def test_it_is_replayed_as_if_it_were_training(path: Path) -> None:
    table = made_table(path, failing="l1")
    good, bad = (Candidate(Formula.parse(f"global: {body} * 10").canonical(), True) for body in ("l2", "l1"))
    curve = table.objective(good)
    assert len(curve) == EPOCHS and curve[-1] == table.aps["global: l2 * 10"]
    assert [epoch for epoch, ap in enumerate(curve[:-1], 1) if ap is not None and not math.isnan(ap)] == list(CHECKS)
    failing = table.objective(bad)
    assert len(failing) == 4 and failing[-1] is None and failing[1] is not None
    with pytest.raises(TableError, match="replicate 1"):
        table.objective(Candidate(good.formula, True, 1))
    with pytest.raises(TableError, match="found 'none'"):
        table.objective(Candidate(Formula(), True))


def test_failures_and_early_stopping_are_replayed(path: Path) -> None:
    table = made_table(path, failing="l1")
    rules = Rules(controls=0, finalists=0, stop=StopRule(min_known=3, margin=0.0))
    search = random_search(SMALL.names, 0, 34, rules, table.admit, spaces=SMALL.spaces)
    told = {e.id: e.payload for e in run_serial(search, table.objective) if e.kind == "told"}
    formulas = {ask.id: str(ask.candidate.formula) for ask in search.history.asks}
    assert sorted(formulas.values()) == sorted(table.aps)
    for id, payload in told.items():
        if payload["status"] == "failed":
            assert table.aps[formulas[id]] is None and payload["epochs"] == 3
        elif payload["status"] == "stopped":
            assert payload["epochs"] in CHECKS
        else:
            assert payload["ap"] == table.aps[formulas[id]] and payload["epochs"] == EPOCHS
    assert {payload["status"] for payload in told.values()} == {"failed", "stopped", "completed"}


def test_halves_share_single_formulas_and_split_the_others(path: Path) -> None:
    table = made_table(path, replicated=34)
    first, second = table.half("first"), table.half("second")
    singles = {text for text in table.aps if ";" not in text}
    assert len(singles) == 10
    assert set(first.aps) & set(second.aps) == singles and set(first.aps) | set(second.aps) == set(table.aps)
    assert min(len(first.aps), len(second.aps)) > 10 + 6  # of 24 others
    assert table.half("all") is table and first.grid == SMALL
    assert all(len([r for r in first.rows if r.formula == text]) == 3 for text in first.aps)
    missing = Formula.parse(min(set(table.aps) - set(first.aps)))
    assert first.admit(missing) == "not in this part of the table" and second.admit(missing) is None


def test_the_spread_of_seeds_is_pooled(path: Path) -> None:
    table = made_table(path, replicated=34, noise=0.01)
    between, within, count = table.spreads()
    assert count == 34 and within == pytest.approx(0.01, rel=0.25)
    assert between == pytest.approx(stdev(ap for ap in table.aps.values() if ap is not None))
    assert math.isnan(made_table(path).spreads()[1])


def test_the_order_by_hash_is_the_same_whatever_comes_in() -> None:
    formulas = list(SMALL.formulas())
    assert by_hash(formulas) == by_hash(reversed(formulas)) != formulas
    assert {len(formula.terms) for formula in by_hash(formulas)[:8]} == {1, 2}


def test_tables_that_cannot_be_kept_are_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = records(SMALL)
    object.__setattr__(stopped[3], "status", "stopped")
    with pytest.raises(ValueError, match="not stopped"):
        write_table(path, stopped, {})
    monkeypatch.setattr("autodet.search.table_file.LARGEST", 1000)
    with pytest.raises(ValueError, match="at most 1000 bytes, found"):
        write_table(path, records(SMALL), {})
    assert not path.exists()


def test_formulas_are_found_however_they_are_written(path: Path) -> None:
    made_table(path)
    path.write_text(path.read_text().replace("global: l2 * 10,", "global:l2*10.0,"))
    assert "global: l2 * 10" in read_table(path).aps


def test_a_table_without_its_grid_can_be_read_but_not_searched(path: Path) -> None:
    write_table(path, records(SMALL), {"data": "made"})
    table = read_table(path)
    assert isinstance(table, Table)
    with pytest.raises(TableError, match="'grid'"):
        _ = table.grid


Damage = Callable[[list[str]], list[str]]


def edited(line: int, old: str, new: str) -> Damage:
    """Replace text in a line, counted from 1."""

    def damage(lines: list[str]) -> list[str]:
        assert old in lines[line - 1], lines[line - 1]
        return [*lines[: line - 1], lines[line - 1].replace(old, new), *lines[line:]]

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [], "line 1: expected provenance.*an empty file"),
        (lambda lines: lines[1:], "line 1: expected provenance.*found 'formula,"),
        (edited(1, "}", ""), "line 1: expected provenance in JSON"),
        (edited(1, "# {", "# [{"), "line 1"),
        (lambda lines: lines[:1], "line 2: expected the columns formula,replicate"),
        (edited(2, "ap@2", "ap@two"), "line 2: expected the columns"),
        (edited(2, "ap@2", "ap@4"), "line 2: expected the columns"),
        (edited(2, "seconds", "minutes"), "line 2: expected the columns"),
        (edited(5, "completed,", ""), "line 5: expected 8 values, found 7"),
        (edited(5, "completed", "stopped"), "line 5: expected status completed or failed, found 'stopped'.*no early"),
        (edited(5, "completed", "failed"), "line 5: expected an 'ap' exactly where"),
        (edited(5, ",0,completed,0.", ",0,completed,21."), "line 5: expected an AP in 0–1, found 21.*by 100"),
        (edited(5, ",0,completed,0.", ",0,completed,x"), "line 5: expected a number of at least 0 as AP"),
        (edited(5, ",0,completed", ",-1,completed"), "line 5: expected a whole number of at least 0 as replicate"),
        (edited(5, ",6,12.50", ",3,12.50"), "line 5: expected no AP later than 'epochs', found 3"),
        (edited(5, ",12.50", ",nan"), "line 5: expected a number of at least 0 as seconds"),
        (edited(5, "global:", "globe:"), "line 5: cannot read the formula.*unknown input"),
        (lambda lines: [*lines, lines[7]], "each training once, found replicate 0 of .* 2 times"),
        (edited(5, ",0,completed", ",4,completed"), "expected replicate 0 of every formula"),
    ],
)
def test_damage_is_named_with_file_line_and_remedy(path: Path, damage: Damage, message: str) -> None:
    made_table(path)
    path.write_text("".join(f"{line}\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(TableError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value) and ";" in str(caught.value)


def test_a_file_that_is_no_text_is_refused(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match="expected text in UTF-8"):
        read_table(path)
