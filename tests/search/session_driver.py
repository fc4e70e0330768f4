"""Drives searches without Ray: trains candidates by a stand-in, some of which fail or are stopped, or replays them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from search_objective import INPUTS, curve

from autodet.records import Event
from autodet.search import Ask, AskTell, Breeding, DivideAndConquer, DivideSettings, Rules, Session, StopRule

EPOCHS = 3


def make_search(seed: int = 0) -> DivideAndConquer:
    """A small search over all inputs that stops early at times."""
    rules = Rules(controls=2, finalists=2, final_runs=2, stop=StopRule(min_epochs=1, min_known=2, margin=0.0))
    breeding = Breeding(population=2)
    settings = DivideSettings(
        budget_per_input=8, weights_budget=8, formulas=breeding, weights=breeding, replicated=2, runs=2, rules=rules
    )
    return DivideAndConquer(INPUTS, seed, settings)


def train_serially(session: Session, workers: int = 1, pause: float = 0.0) -> None:
    """Run to the end, ``workers`` candidates open at a time; every eleventh fails."""
    open_asks: list[Ask] = []
    while True:
        while len(open_asks) < workers and isinstance(answer := session.next(), Ask):
            open_asks.append(answer)
        if not open_asks:
            return
        _train(session, open_asks.pop(0), pause)


def _train(session: Session, ask: Ask, pause: float) -> None:
    values = curve(ask.candidate, EPOCHS)
    for epoch, ap in enumerate(values[:-1], start=1):
        time.sleep(pause)
        if session.report(ask.id, epoch, ap, {"seconds": float(epoch)}):
            session.tell(ask.id, None)
            return
    if ask.id % 11 == 10:
        session.tell(ask.id, {"status": "failed", "ap": None, "cause": "diverged"})
    else:
        session.tell(ask.id, {"status": "completed", "ap": values[-1], "epochs": EPOCHS})


def follow(search: AskTell, events: Sequence[Event]) -> None:
    """Ask, report and tell as recorded, and require the same answers."""
    for event in events:
        if event.kind == "asked":
            assert search.ask() == Ask.from_payload(event.id, event.payload)
        elif event.kind == "reported":
            stopped = search.report(event.id, event.payload["epoch"], event.payload["ap"])
            assert stopped == (event.payload["verdict"] == "stop")
        else:
            search.tell(event.id, event.payload["ap"], event.payload["status"])
