"""Outlining: live-ins and live-outs against their definition."""

from __future__ import annotations

from itertools import combinations

import pytest
from helpers import load, named

from stagecut.ir.graph import Op, Program, Value
from stagecut.ir.outline import BEFORE, positions
from stagecut.passes.canonicalize import Canonicalize
from stagecut.passes.resolve_aliases import ResolveAliases
from stagecut.passes.version_mutations import VersionMutations


def slow_live_ins(inside: list[Op]) -> set[Value]:
    """What ops inside read and no op inside defines."""
    defined = {value for op in inside for value in op.definitions()}
    return {value for op in inside for value in op.reads} - defined


def slow_live_outs(program: Program, inside: list[Op], after: list[Op]) -> set[Value]:
    """What ops inside define and an op after them, or the output, reads."""
    read = {value for op in [*after, program.output] for value in op.reads}
    return {value for op in inside for value in op.definitions()} & read


@pytest.mark.parametrize("case", ["writes", "tied", "gradients", "modules", "sources", "crossing", "own-writes", "linked", "double-write"])
def test_every_interval_of_every_case(case: str) -> None:
    program = load(case, Canonicalize(), ResolveAliases(), VersionMutations())
    ops = list(program.all_ops())
    where = positions(program)
    for start, stop in combinations(range(len(ops) + 1), 2):
        inside = ops[start:stop]
        live_ins, live_outs = where.live_ins(inside), where.live_outs(inside)
        assert set(live_ins) == slow_live_ins(inside)
        assert set(live_outs) == slow_live_outs(program, inside, ops[stop:])
        assert len(set(live_ins)) == len(live_ins)
        assert len(set(live_outs)) == len(live_outs)


def test_order_is_first_use_and_definition() -> None:
    program = load("crossing")
    where = positions(program)
    assert where.live_ins(program.stages[2].ops) == [named(program, n) for n in ("@buf", "%late", "%a", "%x")]
    assert where.live_outs(program.stages[0].ops) == [named(program, n) for n in ("%skip", "%values", "%indices", "%early")]


def test_nothing_is_live_around_no_ops() -> None:
    where = positions(load("crossing"))
    assert where.live_ins([]) == []
    assert where.live_outs([]) == []


def test_positions() -> None:
    program = load("modules")
    where = positions(program)
    assert [where.defined(op.results[0]) for op in program.ops] == list(range(9))
    assert where.defined(program.inputs[0]) == BEFORE
    assert where.last[named(program, "%i")] == where.end == 9


def test_state_is_there_before_the_first_op() -> None:
    program = load("crossing")
    assert all(positions(program).defined(e.value) == BEFORE for e in program.state)
