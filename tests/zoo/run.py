"""Cuts every architecture of the zoo into two and four stages in both modes, each in a process of its own, and prints a table."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.check import ONE_MODE
from zoo.models import ARCHITECTURES, Architecture

STAGES = (2, 4)


def main() -> int:
    """1 when anything is wrong."""
    options = _options()
    chosen = [a for a in ARCHITECTURES if not options.only or any(o in (a.name, a.family) for o in options.only)]
    if not chosen:
        sys.exit(f"no architecture or family is named {' or '.join(options.only)}")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo.check", "transformers"])
    start, wrong, one_mode = time.perf_counter(), Counter[int](), Counter[int]()
    _say(f"{'architecture':46}2 stages  4 stages")
    with ThreadPoolExecutor(options.jobs) as pool:
        for architecture, results in zip(chosen, pool.map(lambda a: _in_process(context, a, options.timeout), chosen), strict=True):
            found = dict(zip(STAGES, results, strict=True))
            _say(f"{architecture.name:46}" + "".join(f"{_word(result):10}" for result in results).rstrip())
            for stages, result in found.items():
                if result != "ok":
                    _say(f"    {stages} stages, {result[:300]}")
            wrong.update(stages for stages, result in found.items() if _word(result) == "WRONG")
            one_mode.update(stages for stages, result in found.items() if _word(result) == ONE_MODE)
    for stages in STAGES:
        right = len(chosen) - wrong[stages]
        _say(
            f"{stages} stages: {right} of {len(chosen)} ok, {right - one_mode[stages]} of them switched to the other mode and back; "
            f"{one_mode[stages]} refuse to switch"
        )
    _say(f"{time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


def _word(result: str) -> str:
    """The result in the table."""
    return result if result == "ok" else ONE_MODE if result.startswith(ONE_MODE) else "WRONG"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these architectures or families")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one architecture")
    return parser.parse_args()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _in_process(context: multiprocessing.context.ForkServerContext, architecture: Architecture, timeout: float) -> list[str]:
    """One result per number of stages; a process that dies or hangs costs its own results only."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, ARCHITECTURES.index(architecture)))
    process.start()
    theirs.close()
    results: list[str] = []
    end = time.monotonic() + timeout
    try:
        while len(results) < len(STAGES) and ours.poll(max(0.0, end - time.monotonic())):
            results.append(ours.recv())
        lost = f"took over {timeout:.0f} s"
    except EOFError:
        process.join()
        lost = f"the process died with exit code {process.exitcode}"
    process.kill()
    process.join()
    return [*results, *[lost] * (len(STAGES) - len(results))]


def _work(connection: Connection, index: int) -> None:
    import warnings

    import torch
    from zoo.check import check

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    for stages in STAGES:
        connection.send(check(ARCHITECTURES[index], stages))


if __name__ == "__main__":
    sys.exit(main())
