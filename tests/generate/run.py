"""Generates with every decoder of the zoo through two stages, in one process and on two ranks, and prints a table."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from generate.check import check, decoders, on_rank, results_in


def main() -> int:
    """1 when tokens differ anywhere, or when fewer than 95 in 100 are right."""
    options = _options()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["generate.check", "transformers"])
    start, right, silent = time.perf_counter(), 0, 0
    chosen = [place for place, one in enumerate(decoders()) if not options.only or one.name in options.only or one.family in options.only]
    for place in chosen:
        results = []
        if options.where != "ranks":
            results.append(_apart(context, place, options.timeout))
        if options.where != "process":
            results += _on_ranks(context, place, options.timeout)
        wrong = [result for result in results if result != "ok"]
        right += not wrong
        silent += any("DIFFERENT" in result for result in results)
        one = decoders()[place]
        _say(f"{one.family:16} {one.name:44} {'ok' if not wrong else wrong[0][:200]}")
    _say(f"{right} of {len(chosen)} equal, {silent} silently different; {time.perf_counter() - start:.0f} s")
    return 1 if silent or right < 0.95 * len(chosen) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these architectures or families")
    parser.add_argument("--where", choices=("process", "ranks", "both"), default="both", help="in one process, on two ranks, or both")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one architecture")
    return parser.parse_args()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _apart(context: multiprocessing.context.ForkServerContext, place: int, timeout: float) -> str:
    """The result in one process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        _run([context.Process(target=_local, args=(place, folder))], timeout)
        return next(results_in(Path(folder)))


def _local(place: int, folder: str) -> None:
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Path(folder, "rank0").write_text(check(decoders()[place]))


def _on_ranks(context: multiprocessing.context.ForkServerContext, place: int, timeout: float) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        _run([context.Process(target=on_rank, args=(rank, place, folder)) for rank in range(2)], timeout)
        return [*results_in(Path(folder))]


def _run(processes: list[multiprocessing.context.ForkServerProcess], timeout: float) -> None:
    """Runs processes to their end, or for so many seconds."""
    end = time.monotonic() + timeout
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()


if __name__ == "__main__":
    sys.exit(main())
