"""partition: every op is in one stage."""

from __future__ import annotations

from helpers import Bless, diff_of, leaves_alone, load

from stagecut.ir.text.parser import parse
from stagecut.passes.find_splits import FindSplits
from stagecut.passes.partition import Partition


def test_idle_markers_make_no_stage(bless: Bless) -> None:
    bless("partition-markers.diff", diff_of(Partition(), load("markers")))


def test_no_marker_one_stage() -> None:
    program = load("modules", Partition())
    assert [len(stage.ops) for stage in program.stages] == [9]


def test_every_op_in_program_order() -> None:
    program = load("modules", FindSplits(policy=lambda p: range(9)))
    order = [op for op in program.ops if not op.is_split]
    Partition().run(program)
    assert [stage.ops for stage in program.stages] == [[op] for op in order]
    assert program.ops == []


def test_program_without_ops_has_one_stage() -> None:
    program = parse("program @Echo phase=traced {\n input %x : f32[2]\n output (%x)\n}")
    diff_of(Partition(), program)
    assert len(program.stages) == 1


def test_staged_program_stays() -> None:
    leaves_alone(Partition(), load("shared"))
