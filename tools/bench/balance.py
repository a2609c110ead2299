"""How near the automatic cuts come to the bound, and how far other ways to balance stay from it, on models of
published sizes.

    python -m stagecut.tools.bench.balance --models "Llama 8B" --stages 4 8 16

Every number is the predicted step of 1F1B with four micro-batches for each stage, over the step of stages
that are all as fast as the bound, with links that take no time. All ways are judged by the same costs: a
roofline of one device, with the loss of language models. Nothing is run; models are on the meta device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from stagecut.backend.costs.balance import Balanced, runs_in
from stagecut.backend.costs.line import Line
from stagecut.backend.costs.loss import counted_loss
from stagecut.backend.costs.ops import DEVICES, state_bytes
from stagecut.backend.costs.search import Problem
from stagecut.backend.costs.setting import Setting
from stagecut.ir.graph import Op, Program
from stagecut.passes.pipeline import PASSES
from stagecut.pipe import lower
from stagecut.tools.bench.models import MODELS
from stagecut.tools.bench.rivals import (
    blockpartition,
    equal_counts,
    equal_sums,
    partition_balanced,
)

MICROBATCHES = 4
"""Micro-batches for each stage."""

WAYS = (
    "stagecut",
    "stagecut, free links",
    "equal layers",
    "equal parameters",
    "torchgpipe",
    "DeepSpeed <= 0.10",
)


def ways(
    program: Program, layers: list[str], stages: list[int], device: str
) -> dict[int, dict[str, float]]:
    """Number of stages -> way -> a step of 1F1B over that of even stages and free links; nan where there are
    too few layers.
    """
    where = replace(DEVICES[device], memory=math.inf)
    setting = Setting(where)
    loss = counted_loss(program, None, {}, setting)
    line = Line.of(program, setting, {}, None, loss)
    found: dict[int, dict[str, float]] = {}
    for count in stages:
        setting = Setting(where, n_microbatches=MICROBATCHES * count)
        free = replace(setting, device=replace(where, link_bandwidth=math.inf))
        line = replace(line, setting=setting)
        policy = Balanced(count, setting, tolerance=0.0, inside="always")
        plan = policy.of_line(line)
        alone = replace(policy, setting=free).of_line(replace(line, setting=free))
        even = plan.bound * (setting.n_microbatches + count - 1)
        found[count] = dict.fromkeys(WAYS, math.nan)
        found[count] |= {
            "stagecut": plan.step / even,
            "stagecut, free links": alone.step / even,
        }
        if count <= len(layers):
            steps = policy.steps(line, count, 1.0)
            for name, cuts in _others(line, layers, steps.problem, count).items():
                step = steps.seconds(torch.tensor([cuts]))
                found[count][name] = float(step) / even
    return found


def _others(
    line: Line, layers: list[str], problem: Problem, count: int
) -> dict[str, list[int]]:
    """The cuts of the other ways. The ways that balance costs or parameters count the parts before and after
    the layers as parts of their chain.
    """
    chain = _chain(line.ops, layers)
    parts = [*itertools.pairwise(chain)]
    seconds = [float(problem.times[0][b] - problem.times[0][a]) for a, b in parts]
    first = chain.index(_begin(line.ops, layers[0]))
    only_layers = [0, *chain[first + 1 : first + len(layers)], len(line.ops)]
    return {
        "equal layers": _ends(equal_counts(len(layers), count), only_layers),
        "equal parameters": _ends(
            equal_sums([_parameters(line, a, b) for a, b in parts], count), chain
        ),
        "torchgpipe": _ends(blockpartition(seconds, count), chain),
        "DeepSpeed <= 0.10": _ends(partition_balanced(seconds, count), chain),
    }


def _begin(ops: list[Op], path: str) -> int:
    return next(i for i, op in enumerate(ops) if runs_in(op, path))


def _chain(ops: list[Op], layers: list[str]) -> list[int]:
    """The places where the parts of a model begin that others balance: the part before the layers, each
    layer, and the part after the last one.
    """
    begins = [_begin(ops, path) for path in layers]
    last = max(i for i, op in enumerate(ops) if runs_in(op, layers[-1]))
    return list(dict.fromkeys([0, *begins, last + 1, len(ops)]))


def _parameters(line: Line, a: int, b: int) -> float:
    entries = dict.fromkeys(
        entry
        for op in line.ops[a:b]
        for entry in line.state_read(op)
        if entry.kind == "param"
    )
    return float(state_bytes(entries)[0])


def _ends(lengths: list[int], places: list[int]) -> list[int]:
    """The cuts that blocks of so many parts make, including the first and the last place."""
    cuts, at = [places[0]], 0
    for length in lengths:
        at += length
        cuts.append(places[at])
    return [*cuts[:-1], places[-1]]


def main(argv: list[str] | None = None) -> int:
    """Prints the table. Exit status 1 when a cut of ours is more than one percent above a cut of
    another way.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(MODELS),
        choices=list(MODELS),
        metavar="MODEL",
    )
    parser.add_argument("--stages", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--device", default="H100", choices=list(DEVICES))
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    chosen = parser.parse_args(argv)
    print(
        f"{'':16}{'stages':>7}"
        + "".join(f"{way:>21}" for way in WAYS)
        + f"{'cut s / trace s':>17}"
    )
    table: dict[str, dict[int, dict[str, float]]] = {}
    worse = 0
    for name in chosen.models:
        model, args, kwargs, layers = MODELS[name]()
        begin = time.perf_counter()
        program, _, _ = lower(model, args, kwargs)
        traced = time.perf_counter() - begin
        for step in PASSES[:4]:
            step().run(program)
        begin = time.perf_counter()
        table[name] = ways(program, list(layers), chosen.stages, chosen.device)
        share = (time.perf_counter() - begin) / len(chosen.stages) / traced
        for count, row in table[name].items():
            print(
                f"{name:16}{count:>7}"
                + "".join(f"{row[way]:>21.3f}" for way in WAYS)
                + f"{share:>17.3f}",
                flush=True,
            )
            worse += any(row["stagecut"] > 1.01 * row[way] for way in WAYS[2:])
    if chosen.json:
        chosen.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
