"""Trains every model with adapters under all schedules on two ranks, ten steps beside one process. Exits with 1 when one differs."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.adapters import ADAPTERS, cut, train_each
from cluster.matrix import SCHEDULES, on_ranks, stages_of

RANKS, STEPS = 2, 10


def main() -> int:
    """One line for each model and number of stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    start, failed = time.perf_counter(), 0
    for name in chosen.models:
        for stages in (RANKS, 2 * RANKS):
            schedules = [schedule for schedule in chosen.schedules if stages_of(schedule, RANKS) == stages]
            try:
                on_ranks(RANKS, train_each, [(*cut(name, stages), schedules)], STEPS)
                result = "ok"
            except Exception:
                failed += 1
                result = traceback.format_exc()
            print(f"{name:12}{stages} stages  {' '.join(schedules)}  {result}", flush=True)
    print(f"{failed} failed; {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
