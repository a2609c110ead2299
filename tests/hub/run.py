"""Trains ten architectures from a folder of transformers to another, on three ranks and in one process, and prints what differs."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hub.check import SUBJECTS, check


def main() -> int:
    """1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[subject.name for subject in SUBJECTS], metavar="NAME", help="these architectures")
    chosen = parser.parse_args().only
    warnings.simplefilter("ignore")
    start, wrong = time.perf_counter(), 0
    for subject in SUBJECTS:
        if subject.name not in chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                differences = check(subject, Path(folder))
            except Exception as error:
                differences = [f"{type(error).__name__}: {error}"]
        wrong += bool(differences)
        result = f"{len(differences)} differ: {differences[0]}" if differences else "ok"
        _say(f"{subject.name:34} {result}")
    _say(f"{wrong} of {len(chosen)} wrong; {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
