"""Attention whose mask hides just the future becomes causal attention, because torch has faster kernels for
it than for masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stagecut.ir.graph import CAUSAL, Op, Program, Value
from stagecut.ir.ops import ATTENTION_ARGUMENTS, attention_arguments, facts

MaskKind = Callable[[Value, Value, Value, Value, Value], str | None]
"""A mask, and the query, key, value and result of its attention -> CAUSAL or OPEN where the attention can do
without the mask; else None.
"""


def _unknown(
    mask: Value, query: Value, key: Value, value: Value, result: Value
) -> str | None:
    return None


@dataclass(frozen=True)
class CausalAttention:
    """An attention whose mask is proved to be CAUSAL or OPEN has no mask.

    kind: tells what is known of a mask. By default nothing is known, because IR text alone does not run the
    mask's ops.
    """

    name = "causal-attention"
    kind: MaskKind = field(default=_unknown)

    def run(self, program: Program) -> bool:
        return bool(self.unmasked(program))

    def unmasked(self, program: Program) -> list[Op]:
        """Removes every mask that is proved to be needless; the attention ops that had one."""
        if program.phase != "traced":
            return []
        return [op for op in program.ops if facts(op).attention and self._unmask(op)]

    def _unmask(self, op: Op) -> bool:
        arguments = attention_arguments(op)
        read = [arguments.get(name) for name in ("attn_mask", "query", "key", "value")]
        values = [operand for operand in read if isinstance(operand, Value)]
        # other kernels draw other numbers
        draws = arguments.get("dropout_p", 0.0) != 0.0
        if len(values) < 4 or draws or arguments.get("is_causal", False) is not False:
            return False
        mask, query, key, value = values
        kind = self.kind(mask, query, key, value, op.results[0])
        if kind is None:
            return False
        _set_argument(op, "attn_mask", None)
        if kind == CAUSAL:
            _set_argument(op, "is_causal", True)
        return True


def _set_argument(op: Op, name: str, value: Any) -> None:
    """The op has this argument, by position where it had it by position."""
    args, kwargs = list(op.args), dict(op.kwargs)
    position = ATTENTION_ARGUMENTS.index(name)
    if position < len(args):
        args[position] = value
    else:
        kwargs[name] = value
    op.set_operands(tuple(args), kwargs)
