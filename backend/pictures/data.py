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
        p = self._program
        data: dict[str, Any] = {"format": FORMAT, "name": p.name, "phase": p.phase}
        data["inputs"] = [self._value(v) for v in p.inputs]
        data["state"] = [self._entry(e) for e in p.state]
        if p.phase == "traced":
            data["ops"] = self._ops(p.ops)
        data["stages"] = [self._stage(s) for s in p.stages]
        data["transfers"] = [self._transfer(t) for t in p.transfers]
        data["outputs"] = [
            self._names[item] if isinstance(item, Value) else repr(item)
            for item in p.outputs
        ]
        return data

    def _value(self, value: Value) -> dict[str, Any]:
        return {
            "name": self._names[value],
            "type": str(value.type),
            "bytes": value_bytes(value.type),
        }

    def _entry(self, e: StateEntry) -> dict[str, Any]:
        persistent = [name for name in e.names if name not in e.transient]
        found = {
            "names": list(e.names),
            "kind": e.kind,
            "persistent": persistent,
            "stages": list(e.stages),
            "share": e.share,
        }
        return {**found, "type": str(e.type), "bytes": value_bytes(e.type)}

    def _stage(self, stage: Stage) -> dict[str, Any]:
        inputs, outputs = (
            [self._names[v] for v in values] for values in (stage.inputs, stage.outputs)
        )
        held = [name for names in stage.state.values() for name in names]
        return {
            "index": stage.index,
            "inputs": inputs,
            "outputs": outputs,
            "state": held,
            "ops": self._ops(stage.ops),
        }

    def _transfer(self, t: Transfer) -> dict[str, Any]:
        made = self._names[t.made] if t.made is not None else None
        route = {
            "source": t.source,
            "target": t.target,
            "route": t.route,
            "via": list(t.via),
            "made": made,
        }
        return {
            "value": self._names[t.value],
            **route,
            "bytes": value_bytes(t.value.type),
        }

    def _ops(self, ops: list[Op]) -> list[dict[str, Any]]:
        return [self._op(op) for op in ops if self._keep(op)]

    def _op(self, op: Op) -> dict[str, Any]:
        written = {
            self._names[old]: self._names[new] for old, new in op.versions.items()
        }
        return {
            "target": op.target,
            "operands": [self._names[v] for v in op.operands],
            "results": [self._value(v) for v in op.results],
            "versions": written,
            "random": op.effects.random,
            "module": scope_text(op.scope),
            "source": str(op.loc) if op.loc else None,
        }
