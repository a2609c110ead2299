"""What may be said of the backward of a stage: to `Driver`, and to `Setting` for the costs."""

from __future__ import annotations

from stagecut.ir.errors import InputError, nearest

BACKWARDS = ("autograd", "graph")


def refuse_backward(backward: str, compiled: bool, recompute: bool) -> None:
    """Raises InputError for a backward that is not known, and for options that only graphs have."""
    if backward not in BACKWARDS:
        raise InputError(
            f"backward={backward!r} is not known",
            hint=nearest(str(backward), BACKWARDS),
        )
    if backward == "autograd" and compiled:
        raise InputError(
            "compile=True compiles the functions of backward='graph'",
            hint="wrap=lambda module, index: torch.compile(module) compiles stages for autograd",
        )
    if backward == "autograd" and recompute:
        raise InputError(
            "recompute=True chooses what backward='graph' saves",
            hint="torch.utils.checkpoint in the model computes again for autograd",
        )
