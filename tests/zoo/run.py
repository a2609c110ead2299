"""Cuts every architecture of the zoo into two and four stages in both modes, each in a process of its own, and prints a table.

With `--backward graph`, it cuts each into two stages in train mode, and compares what graphs compute with what autograd does.
"""

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

from zoo.backward import BY_AUTOGRAD, REFUSED
from zoo.check import ONE_MODE, VOID
from zoo.models import ARCHITECTURES, Architecture, Place

STAGES = {"autograd": (2, 4), "graph": (2,)}
"""Into how many stages models are cut, by the backward of the stages."""
WORDS = (ONE_MODE, BY_AUTOGRAD, REFUSED, VOID)
"""How results begin that are neither ok nor wrong."""


def main() -> int:
    """1 when anything is wrong."""
    options = _options()
    chosen = [a for a in ARCHITECTURES if not options.only or any(o in (a.name, a.family) for o in options.only)]
    if not chosen:
        sys.exit(f"no architecture or family is named {' or '.join(options.only)}")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    # what the imports of a fork server ask of a GPU keeps its forks from using it
    context = multiprocessing.get_context("forkserver" if options.device == "cpu" else "spawn")
    if options.device == "cpu":
        context.set_forkserver_preload(["zoo.check", "zoo.backward", "transformers"])
    start, words = time.perf_counter(), {stages: Counter[str]() for stages in STAGES[options.backward]}
    _say(f"{'architecture':46}" + "  ".join(f"{stages} stages" for stages in words))

    def results_of(architecture: Architecture) -> list[str]:
        return _in_process(context, architecture, options.backward, (options.device, options.dtype), options.timeout)

    with ThreadPoolExecutor(options.jobs) as pool:
        for architecture, results in zip(chosen, pool.map(results_of, chosen), strict=True):
            _say(f"{architecture.name:46}" + "".join(f"{_word(result):10}" for result in results).rstrip())
            for stages, result in zip(words, results, strict=True):
                words[stages][_word(result)] += 1
                if result != "ok":
                    _say(f"    {stages} stages, {result[:300]}")
    for stages, counts in words.items():
        _say(f"{stages} stages: {_summary(counts, options.backward)}")
    _say(f"{time.perf_counter() - start:.0f} s")
    return 1 if any(counts["WRONG"] for counts in words.values()) else 0


def _summary(counts: Counter[str], backward: str) -> str:
    total, right = counts.total(), counts.total() - counts["WRONG"]
    if backward == "graph":
        return (
            f"{counts['ok']} of {total} equal by graphs; in {counts[BY_AUTOGRAD]} a stage runs by autograd, "
            f"{counts[REFUSED]} are refused, {counts['WRONG']} differ"
        )
    void = f", {counts[VOID]} do not run there themselves" if counts[VOID] else ""
    return f"{right} of {total} ok{void}, {counts['ok']} of them switched to the other mode and back; {counts[ONE_MODE]} refuse to switch"


def _word(result: str) -> str:
    """The result in the table."""
    if result == "ok":
        return result
    return next((word for word in WORDS if result.startswith(word)), "WRONG")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these architectures or families")
    parser.add_argument("--backward", choices=STAGES, default="autograd", help="compare graphs with autograd instead")
    parser.add_argument("--device", default="cpu", help="where models and inputs lie: cpu, cuda, cuda:1")
    parser.add_argument("--dtype", help="of parameters, buffers and inputs: bfloat16, float16, float64; theirs by default")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one architecture")
    return parser.parse_args()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _in_process(
    context: multiprocessing.context.BaseContext,
    architecture: Architecture,
    backward: str,
    place: tuple[str, str | None],
    timeout: float,
) -> list[str]:
    """One result per number of stages; a process that dies or hangs costs its own results only."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, ARCHITECTURES.index(architecture), backward, *place))
    wanted = len(STAGES[backward])
    process.start()
    theirs.close()
    results: list[str] = []
    end = time.monotonic() + timeout
    try:
        while len(results) < wanted and ours.poll(max(0.0, end - time.monotonic())):
            results.append(ours.recv())
        lost = f"took over {timeout:.0f} s"
    except EOFError:
        process.join()
        lost = f"the process died with exit code {process.exitcode}"
    process.kill()
    process.join()
    return [*results, *[lost] * (wanted - len(results))]


def _work(connection: Connection, index: int, backward: str, device: str, dtype: str | None) -> None:
    import warnings

    import torch
    from zoo.backward import check_backward
    from zoo.check import check

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    place = Place(device, getattr(torch, dtype) if dtype else None)
    if device != "cpu":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when the first product is computed
        torch.use_deterministic_algorithms(True, warn_only=True)
    compare = {"autograd": check, "graph": check_backward}[backward]
    for stages in STAGES[backward]:
        connection.send(compare(ARCHITECTURES[index], stages, place=place))


if __name__ == "__main__":
    sys.exit(main())
