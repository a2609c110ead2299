"""What may be said of the backward of a stage: to `Driver`, and to `Setting` for the costs."""

from __future__ import annotations

from stagecut.ir.errors import InputError, nearest

BACKWARDS = ("autograd", "graph")


def refuse_backward(
    backward: str,
    compiled: bool,
    recompute: bool,
    activation_budget: int | float | None = None,
) -> None:
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
    if activation_budget is not None:
        _refuse_budget(backward, recompute, activation_budget)


def _refuse_budget(backward: str, recompute: bool, budget: object) -> None:
    if backward == "autograd":
        raise InputError(
            "activation_budget chooses what backward='graph' saves",
            hint="torch.utils.checkpoint in the model computes again for autograd",
        )
    if recompute:
        raise InputError(
            "recompute=True saves as little as light ops allow, whatever activation_budget says",
            hint="one of them",
        )
    is_number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not is_number or (isinstance(budget, float) and not 0.0 <= budget <= 1.0):
        raise InputError(
            f"activation_budget={budget!r} is neither bytes nor a part",
            hint="an int for the bytes of a rank, or a float from 0.0 to 1.0",
        )
