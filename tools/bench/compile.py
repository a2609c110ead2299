"""Compile cost: everything after tracing, against the splitter of torch.distributed.pipelining on the same
trace.

Times are compared within one run only; the machine's speed cancels out in the ratios.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.distributed.pipelining._IR import Pipe as TorchPipe
from torch.distributed.pipelining._IR import aten_pipe_split_alias
from torch.export import ExportedProgram

from stagecut.frontend.capture.capture import capture
from stagecut.frontend.lower.from_export import lower_export
from stagecut.frontend.lower.lower import Lowering
from stagecut.frontend.markers import SplitPoint
from stagecut.ir.check.validator import Trace, validate
from stagecut.ir.graph import Program, StateEntry
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.types import TensorType
from stagecut.passes.pipeline import default_pipeline
from stagecut.passes.runner import run_passes
from stagecut.pipe import Pipe, pipeline
from stagecut.tools.bench.architectures import (
    ARCHITECTURES,
    llama_8b,
    llama_70b,
    llama_405b,
)


def main(argv: list[str] | None = None) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small models and 1k, 10k ops only"
    )
    quick = parser.parse_args(argv).quick
    print(
        f"{'model':28}{'ops':>7}{'stages':>8}{'ours/torch':>12}{'ours/trace':>12}{'memory/trace':>14}"
    )
    for architecture in ARCHITECTURES:
        torch.manual_seed(0)
        _row(
            architecture.name,
            lambda a=architecture: (a.make().eval(), a.inputs()),  # type: ignore[misc]
            architecture.cuts,
            repeat=5,
        )
    if not quick:
        _row(
            "Llama 405B on meta",
            llama_405b,
            tuple(f"model.layers.{i}" for i in range(8, 128, 8)),
            repeat=3,
        )
    print(
        f"\n{'pipeline() / torch.export':28}{'fold':>8}{'whole':>8}{'memory of fold':>16}"
    )
    _compared("Llama 8B on meta", llama_8b)
    if not quick:
        _compared("Llama 70B on meta", llama_70b)
        _compared("Llama 405B on meta", llama_405b)
    print(f"\n{'synthetic chain':28}{'ops':>7}{'per op, relative to the first':>32}")
    first = 0.0
    for count in (1_000, 10_000) if quick else (10_000, 100_000):
        cost = _best(lambda n=count: _compile_chain(n), 3) / count  # type: ignore[misc]
        first = first or cost
        print(f"{'':28}{count:>7}{cost / first:>32.2f}")
    return 0


def _row(
    name: str,
    make: Callable[[], tuple[torch.nn.Module, dict[str, Any]]],
    cuts: tuple[str, ...],
    repeat: int,
) -> None:
    model, kwargs = make()
    gc.collect()
    start_memory = _resident()
    start = time.perf_counter()
    exported, _ = capture(model, (), kwargs)
    traced = time.perf_counter() - start
    gc.collect()
    trace_memory = _resident() - start_memory
    _mark(exported, cuts)
    tracemalloc.start()
    program, pipe = _compile(exported, model)
    own_memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    ops, stages = sum(1 for _ in program.all_ops()), pipe.num_stages
    del program, pipe
    ours = _best(lambda: _compile(exported, model), repeat)
    theirs = _torch_seconds(exported, model, repeat)
    against = f"{ours / theirs:.3f}" if theirs else "refused"
    memory = f"{own_memory / trace_memory:.2f}" if trace_memory > 2**24 else "-"
    print(
        f"{name:28}{ops:>7}{stages:>8}{against:>12}{ours / traced:>12.3f}{memory:>14}",
        flush=True,
    )


def _compared(
    name: str, make: Callable[[], tuple[torch.nn.Module, dict[str, Any]]]
) -> None:
    """Prints the time of a cut into 16 stages, with `fold` and without, in plain exports of the model.

    The last column is the peak of its memory in that of such an export.
    """
    model, kwargs = make()
    layers = len(model.model.layers)  # type: ignore[union-attr, arg-type]
    cuts = {
        f"model.layers.{stage * layers // 16}": SplitPoint.BEGINNING
        for stage in range(1, 16)
    }

    def cut(fold: bool) -> Pipe:
        return pipeline(model, (), kwargs, cuts, check=None, fold=fold)

    def export() -> ExportedProgram:
        return torch.export.export(model, (), kwargs, strict=False)

    actions = (lambda: cut(True), lambda: cut(False), export)
    export()  # torch loads what it needs
    seconds = [float("inf")] * len(actions)
    for _ in range(2):
        for number, action in enumerate(actions):
            seconds[number] = min(seconds[number], _process_seconds(action))
    fold, whole, plain = seconds
    memory = _peak(lambda: cut(True)) / _peak(export)
    print(
        f"{name:28}{fold / plain:>8.3f}{whole / plain:>8.3f}{memory:>16.2f}", flush=True
    )


def _peak(action: Callable[[], Any]) -> int:
    """How many bytes an action takes at most, in a process of its own."""
    gc.collect()
    source, target = os.pipe()
    child = os.fork()
    if not child:
        before = _resident()
        action()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(target, str(peak - before).encode())
        os._exit(0)
    os.close(target)
    with os.fdopen(source) as result:
        grown = int(result.read())
    os.waitpid(child, 0)
    return grown


def _process_seconds(action: Callable[[], Any]) -> float:
    gc.collect()
    start = time.process_time()
    action()
    return time.process_time() - start


def _torch_seconds(
    exported: ExportedProgram, model: torch.nn.Module, repeat: int
) -> float | None:
    """Seconds of torch's splitter, None where it ends in an error."""
    try:
        return _best(lambda: TorchPipe._from_traced(model, exported), repeat)
    except Exception as error:
        print(f"torch: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def _compile(exported: ExportedProgram, model: torch.nn.Module) -> tuple[Program, Pipe]:
    program, bindings = lower_export(exported, model)
    trace = Trace(program)
    run_passes(program, default_pipeline())
    validate(trace, program)
    return program, Pipe(program, bindings)


def _mark(exported: ExportedProgram, cuts: tuple[str, ...]) -> None:
    """Puts torch's own split marker in front of each module, so that both compilers see the same graph."""
    waiting = list(cuts)
    for node in list(exported.graph.nodes):
        stack = node.meta.get("nn_module_stack") or {}
        inside = {entry[0] for entry in stack.values()}
        for cut in [c for c in waiting if c in inside]:
            waiting.remove(cut)
            with exported.graph.inserting_before(node):
                exported.graph.call_function(aten_pipe_split_alias, ())


def _best(action: Callable[[], Any], repeat: int) -> float:
    best = float("inf")
    for _ in range(repeat):
        gc.collect()
        start = time.perf_counter()
        result = action()
        best = min(best, time.perf_counter() - start)
        del result
    return best


def _resident() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def _compile_chain(count: int) -> Pipe:
    """Lowers, cuts into eight and emits a chain of `count` ops with a skip connection every hundred."""
    graph = fx.Graph()
    sample = torch.empty(4, 4, device="meta")
    x = graph.placeholder("x")
    weight = graph.placeholder("weight")
    value, skip = x, x
    for index in range(count):
        if index and index % (count // 8) == 0:
            graph.call_function(aten_pipe_split_alias, ())
        value = graph.call_function(
            torch.ops.aten.add.Tensor, (value, skip if index % 100 == 0 else weight)
        )
        value.meta = {
            "val": sample,
            "nn_module_stack": {
                f"layers.{index // 50}": (f"layers.{index // 50}", None)
            },
        }
        skip = value if index % 100 == 50 else skip
    graph.output((value,))
    program, bindings = Program("chain"), Bindings()
    kind = TensorType("f32", (4, 4), device="meta")
    entry = StateEntry(("weight",), "param", kind)
    program.state.append(entry)
    bindings.tensors["weight"] = torch.nn.Parameter(sample)
    env: dict[fx.Node, Any] = {x: program.add_input(kind, "x"), weight: entry.value}
    program.set_outputs(
        list(Lowering(program, bindings).run(graph.nodes, env, program.ops, ()))
    )
    run_passes(program, default_pipeline())
    return Pipe(program, bindings)


if __name__ == "__main__":
    sys.exit(main())
