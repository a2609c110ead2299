"""route: every transfer has a route, and the program is linked."""

from __future__ import annotations

from helpers import Bless, diff_of, leaves_alone, load

from stagecut.passes.liveness import Liveness
from stagecut.passes.route import Route
from stagecut.passes.share_state import ShareState


def test_feed_send_and_relay(bless: Bless) -> None:
    bless("route-crossing.diff", diff_of(Route(), load("crossing", Liveness())))


def test_single_stage(bless: Bless) -> None:
    bless("route-single.diff", diff_of(Route(), load("single", ShareState(), Liveness())))


def test_relay_names_the_stages_between() -> None:
    program = load("crossing", Liveness(), Route())
    relayed = [(t.source, t.target, t.via) for t in program.transfers if t.route == "relay"]
    assert relayed == [(0, 3, (1, 2)), (0, 3, (1, 2))]
    assert all(t.via == () for t in program.transfers if t.route != "relay")


def test_traced_program_stays() -> None:
    leaves_alone(Route(), load("clean"))
