"""Does the search's cheap proxy rank formulas as a longer training does?

command:   python experiments/check_proxy.py --run RUN [--formulas 10] [--seeds 2]
hardware:  as the search that RUN holds
time:      with preset cpu about 15 minutes
expected:  a table and a picture: mean AP by proxy and by the full schedule, Spearman's rank correlation

Formulas are taken evenly from the run's ranking, best to worst, among those that completed. Go on with --resume FOLDER.
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd
from options import INTERRUPTED, common_options, main_of, new_folder, parsed, positive, recorded, source
from runs import full_task, read_search, run_list, start_or_resume

from autodet.atomic import atomic_write_bytes
from autodet.distill import Formula
from autodet.object_store import named
from autodet.results.frame import leaderboard, rank_agreement, read_run
from autodet.results.intervals import spearman
from autodet.results.plots import draw_rank_agreement, to_png
from autodet.results.report import write_report
from autodet.runtime.cluster import ray_running
from autodet.search import Candidate

SEEDS = 2
FRESH_SEEDS = 2000  # far from those that the search chose by
RECORDED = ("run", "formulas", "seed")
EXTENDABLE = ("workers", "seeds")


def main(argv: list[str] | None = None) -> int:
    """Train the chosen formulas on the full schedule, and compare the two rankings."""
    options = parse(argv)
    folder = options.resume or new_folder(options.output, "check-proxy")
    source = read_search(options.run)
    proxy = read_run(options.run)
    chosen = spread(proxy, options.formulas, source.inherit)
    config = {"script": "check_proxy", "options": recorded(options, (*RECORDED, *EXTENDABLE)), "formulas": chosen}
    extendable = [f"options.{name}" for name in EXTENDABLE]
    task = full_task(source, seed=FRESH_SEEDS + options.seed)
    workers = options.workers or source.preset.workers
    candidates = [
        (Candidate(Formula.parse(text), source.inherit, seed), "long")
        for seed in range(options.seeds or SEEDS)
        for text in chosen
    ]
    with (
        start_or_resume(folder, config, extendable),
        ray_running(options.address, cpus=workers * source.preset.threads),
    ):
        records = run_list(candidates, task, folder / "long", workers, "long", source.preset.gpus)
    if records is None:
        print(f"Not finished. Go on with: --resume {named(folder)}", file=sys.stderr)
        return INTERRUPTED
    table = rank_agreement(proxy, read_run(folder / "long"))
    (folder / "long" / "pictures").mkdir(exist_ok=True)
    atomic_write_bytes(folder / "long" / "pictures" / "rank_agreement.png", to_png(draw_rank_agreement(table)))
    print(table.to_string(index=False))
    print(f"Spearman's rank correlation: {spearman(table['proxy'].tolist(), table['long'].tolist()):.3f}")
    print(f"Report: {write_report(folder / 'long')}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of a resumed check are the recorded ones."""
    parser = common_options(__doc__ or "")
    parser.add_argument("--run", type=source, help="a finished run of search_distiller.py")
    parser.add_argument("--formulas", type=positive, default=10, help="how many (default: 10)")
    parser.add_argument("--seeds", type=positive, help=f"full trainings of each (default: {SEEDS})")
    options = parsed(parser, argv, "check_proxy", RECORDED, EXTENDABLE)
    if options.run is None:
        parser.error("--run RUN is needed: a finished run of search_distiller.py")
    return options


def spread(proxy: pd.DataFrame, count: int, inherit: bool) -> list[str]:
    """Formulas at even distances of the run's ranking, the first and the last included."""
    ranked = leaderboard(proxy)
    texts = ranked[(ranked["formula"] != "none") & (ranked["inherit"] == inherit)]["formula"].tolist()
    if len(texts) < 2 or count < 2:
        raise ValueError(f"Expected at least two formulas to compare, found {len(texts)} completed in the run.")
    places = [round(i * (len(texts) - 1) / (count - 1)) for i in range(count)]
    return [str(texts[place]) for place in dict.fromkeys(places)]


if __name__ == "__main__":
    raise SystemExit(main_of(main))
