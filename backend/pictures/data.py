"""Program -> JSON, for other programs to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from stagecut.ir.graph import Op, Program, Stage, StateEntry, Transfer, Value
from stagecut.ir.text.printer import scope_text, value_names
from stagecut.ir.types import value_bytes

FORMAT = 1
"""Increases when a field changes its meaning or is removed."""


def to_json(program: Program, keep: Callable[[Op], bool] = lambda op: True) -> str:
    """The program as JSON: names as in the text, sizes in bytes, null where symbolic. Ops for which `keep` is
    false are left out.
    """
    return json.dumps(_Data(program, keep).program(), indent=1) + "\n"


class _Data:
    def __init__(self, program: Program, keep: Callable[[Op], bool]) -> None:
        self._program, self._keep = program, keep
        self._names = value_names(program)

    def program(self) -> dict[str, Any]:
        program = self._program
        data: dict[str, Any] = {"format": FORMAT, "name": program.name}
        data["phase"] = program.phase
        data["inputs"] = [self._value(value) for value in program.inputs]
        data["state"] = [self._entry(entry) for entry in program.state]
        if program.phase == "traced":
            data["ops"] = self._ops(program.ops)
        data["stages"] = [self._stage(stage) for stage in program.stages]
        data["transfers"] = [self._transfer(each) for each in program.transfers]
        data["outputs"] = [
            self._names[output] if isinstance(output, Value) else repr(output)
            for output in program.outputs
        ]
        return data

    def _value(self, value: Value) -> dict[str, Any]:
        return {
            "name": self._names[value],
            "type": str(value.type),
            "bytes": value_bytes(value.type),
        }

    def _entry(self, entry: StateEntry) -> dict[str, Any]:
        persistent = [name for name in entry.names if name not in entry.transient]
        return {
            "names": list(entry.names),
            "kind": entry.kind,
            "persistent": persistent,
            "stages": list(entry.stages),
            "share": entry.share,
            "type": str(entry.type),
            "bytes": value_bytes(entry.type),
        }

    def _stage(self, stage: Stage) -> dict[str, Any]:
        return {
            "index": stage.index,
            "inputs": [self._names[value] for value in stage.inputs],
            "outputs": [self._names[value] for value in stage.outputs],
            "state": [name for names in stage.state.values() for name in names],
            "ops": self._ops(stage.ops),
        }

    def _transfer(self, transfer: Transfer) -> dict[str, Any]:
        copy = transfer.recomputed
        return {
            "value": self._names[transfer.value],
            "source": transfer.source,
            "target": transfer.target,
            "route": transfer.route,
            "via": list(transfer.via),
            "made": None if copy is None else self._names[copy],
            "bytes": value_bytes(transfer.value.type),
        }

    def _ops(self, ops: list[Op]) -> list[dict[str, Any]]:
        return [self._op(op) for op in ops if self._keep(op)]

    def _op(self, op: Op) -> dict[str, Any]:
        written = {
            self._names[old]: self._names[new] for old, new in op.versions.items()
        }
        return {
            "target": op.target,
            "operands": [self._names[value] for value in op.operands],
            "results": [self._value(value) for value in op.results],
            "versions": written,
            "random": op.effects.random,
            "module": scope_text(op.scope),
            "source": str(op.loc) if op.loc else None,
        }
