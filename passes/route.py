"""Chooses how each crossing value travels, and links the program."""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.graph import Program, Transfer


@dataclass(frozen=True)
class Route:
    """Every transfer has a route, and stages talk only to their neighbours.

    A user input is fed to the stage that reads it. A value goes to the next stage by `send`, farther by
    `relay` through every stage between, which all schedules of torch.distributed.pipelining can run.

    relayed: names of user inputs that only the first stage is given, and that travel from there.
    """

    relayed: tuple[str, ...] = ()
    name = "route"

    def run(self, program: Program) -> bool:
        if program.phase != "partitioned":
            return False
        for transfer in program.transfers:
            transfer.route = transfer.route or _route(transfer, self.relayed)
        program.raise_phase("linked")
        return True


def _route(transfer: Transfer, relayed: tuple[str, ...]) -> str:
    if transfer.source is None:
        return "relay" if transfer.value.hint in relayed and transfer.target else "feed"
    return "send" if transfer.target == transfer.source + 1 else "relay"
