"""Which model types of transformers `hf:TYPE` builds small and runs forward: `python tests/zoo/small.py [TYPE ...]`, each in a process."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext

import torch

from stagecut.tools.dump_ir.hugging_face import make

MEMORY = 12 * 2**30
"""Bytes of address space that one model may take."""
OPTIONS = argparse.Namespace(config=[], meta=False, batch=2, length=16, named=())


def main() -> int:
    """Prints a line for each type that does not run, and the share of those that do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types (default: all that AutoModel knows)")
    parser.add_argument("--timeout", type=float, default=30, metavar="SECONDS", help="for each type (default: 30)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="so many at once (default: 2)")
    options = parser.parse_args()
    counts, start = Counter[str](), time.perf_counter()
    for name, result in _results(options.types or _all_types(), options.timeout, options.jobs):
        kind = result.partition(":")[0]
        counts[kind] += 1
        if kind != "ok":
            _say(f"{name:31} {result}")
    total = sum(counts.values())
    for kind, count in counts.most_common():
        _say(f"{kind:32}{count:4} of {total}, {100 * count / total:.0f} %")
    _say(f"{time.perf_counter() - start:.0f} s")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _all_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


def _results(types: list[str], timeout: float, jobs: int) -> Iterator[tuple[str, str]]:
    torch.set_num_threads(1)  # a process that is forked has no other threads of torch's
    make("bert", OPTIONS)  # what all need is imported once
    context = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(types, pool.map(lambda name: _in_process(context, name, timeout), types), strict=True)


def _in_process(context: ForkContext, name: str, timeout: float) -> str:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tried, args=(name, theirs))
    process.start()
    theirs.close()
    result = "too slow: "
    try:
        if ours.poll(timeout):
            result = str(ours.recv())
    except EOFError:
        result = "died: "
    process.kill()
    process.join()
    return result


def _tried(name: str, out: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stderr = sys.stdout = open("/dev/null", "w")  # noqa: SIM115
    step = "not built"
    try:
        model, args, kwargs = make(name, OPTIONS)
        step = "fails in forward"
        with torch.no_grad():
            model(*args, **kwargs)
        out.send("ok")
    except Exception as error:
        out.send(f"{step}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


if __name__ == "__main__":
    sys.exit(main())
