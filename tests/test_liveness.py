"""liveness: stages list what crosses, and every crossing value has a transfer."""

from __future__ import annotations

from helpers import Bless, diff_of, leaves_alone, load, named

from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.passes.liveness import Liveness
from stagecut.passes.route import Route
from stagecut.passes.share_state import ShareState


def test_what_crosses(bless: Bless) -> None:
    bless("liveness-crossing.diff", diff_of(Liveness(), load("crossing")))


def test_feedback_state(bless: Bless) -> None:
    bless("liveness-own-writes.diff", diff_of(Liveness(), load("own-writes", ShareState())))


def test_nothing_crosses() -> None:
    leaves_alone(Liveness(), load("single", ShareState()))


def test_order_of_inputs_and_outputs() -> None:
    program = load("crossing", Liveness())
    third, last = program.stages[2:]
    assert third.inputs == [named(program, n) for n in ("%late", "%x", "%a")]
    assert last.inputs == [named(program, n) for n in ("%skip", "%indices", "%c")]
    assert last.outputs == [named(program, n) for n in ("%e", "%d", "@kept")]


def test_text_keeps_inputs_and_outputs_before_route() -> None:
    """What liveness found survives the text form: route on the text gives the same program."""
    program = load("crossing", Liveness())
    again = parse(text(program))
    Route().run(program)
    Route().run(again)
    assert text(again) == text(program)


def test_traced_program_stays() -> None:
    leaves_alone(Liveness(), load("clean"))
