"""Prints what `cluster.matrix` finds: every model under every schedule on 2 and 4 ranks. Exits with 1 when something is wrong."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.matrix import SCHEDULES, try_all
from cluster.models import SUBJECTS


def main() -> int:
    """The table, one line for each model and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    chosen = parser.parse_args()
    print(f"{'':18}{''.join(f'{s:>23}' for s in chosen.schedules)}")
    failed: list[str] = []
    for name in chosen.models:
        for ranks in chosen.ranks:
            found = try_all(name, tuple(chosen.schedules), ranks)
            print(f"{name:12}{ranks:>2} rks {''.join(f'{found[s][:20]:>23}' for s in chosen.schedules)}", flush=True)
            failed += [f"{name}, {ranks} ranks, {s}: {what}" for s, what in found.items() if what != "ok"]
    print("\n".join([*failed, f"{len(failed)} failed"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
