"""version-mutations: after a write, the value and every view of it go by a new version."""

from __future__ import annotations

from helpers import Bless, defining, diff_of, leaves_alone, load, named

from stagecut.ir.graph import Effects
from stagecut.ir.text.printer import text
from stagecut.passes.version_mutations import VersionMutations


def test_write_through_a_view(bless: Bless) -> None:
    bless("version-mutations-writes.diff", diff_of(VersionMutations(), load("writes")))


def test_write_to_two_aliases_and_to_one_value_twice(bless: Bless) -> None:
    bless("version-mutations-double-write.diff", diff_of(VersionMutations(), load("double-write")))


def test_a_write_never_read_again_changes_nothing() -> None:
    leaves_alone(VersionMutations(), load("last-write"))


def test_unversioned_reads_before_the_write_keep_their_name() -> None:
    program = load("writes", VersionMutations())
    assert defining(program, "%before").operands == [named(program, "@buf")]
    assert "%base = aten.clone.default(%buf.1)" in text(program)


def test_operand_written_twice_in_the_effects() -> None:
    """Two written positions of one storage are one write, not two in a row."""
    program = load("double-write")
    swap = program.ops[3]
    swap.effects = Effects(writes=tuple(swap.operands[:2]))
    VersionMutations().run(program)
    assert len(swap.versions) == 2
    assert not set(swap.versions) & set(swap.versions.values())
