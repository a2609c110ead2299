"""share-state: every state name is held by a stage; shared entries have a policy."""

from __future__ import annotations

from helpers import Bless, diff_of, leaves_alone, load

from stagecut.ir.text.parser import parse
from stagecut.passes.share_state import ShareState


def test_shared_tied_unread_and_returned_state(bless: Bless) -> None:
    bless("share-state-shared.diff", diff_of(ShareState(), load("shared")))


def test_writes(bless: Bless) -> None:
    bless("share-state-own-writes.diff", diff_of(ShareState(), load("own-writes")))


def test_every_name_is_held() -> None:
    program = load("shared", ShareState())
    held = [name for stage in program.stages for names in stage.state.values() for name in names]
    twice = ["count", "lifted"]
    assert sorted(held) == sorted([*set(program.name_owners()) - {"lifted_unread"}, *twice])


def test_no_state_nothing_to_do() -> None:
    empty = "program @Empty phase=partitioned {\n input %x : f32[2]\n stage 0 {\n torch.neg(%x)\n }\n output ()\n}"
    leaves_alone(ShareState(), parse(empty))


def test_traced_program_stays() -> None:
    leaves_alone(ShareState(), load("tied"))
