"""resolve-aliases: one state entry per distinct tensor, under all its names."""

from __future__ import annotations

from helpers import Bless, diff_of, leaves_alone, load

from stagecut.passes.resolve_aliases import ResolveAliases


def test_tied_names(bless: Bless) -> None:
    bless("resolve-aliases-tied.diff", diff_of(ResolveAliases(), load("tied")))


def test_every_name_keeps_one_entry() -> None:
    program = load("tied")
    names = {name for entry in program.state for name in entry.names if entry.kind != "const"}
    ResolveAliases().run(program)
    assert set(program.name_owners()) == names
    assert len({entry.tensor for entry in program.state}) == len(program.state)


def test_distinct_tensors_stay() -> None:
    leaves_alone(ResolveAliases(), load("writes"))
