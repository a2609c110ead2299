"""Faults seeded into one pass each: `--bisect` names that pass, `--check-each` says which op, stage and source line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagecut.ir.graph import Program
from stagecut.passes.liveness import Liveness
from stagecut.passes.partition import Partition
from stagecut.passes.resolve_aliases import ResolveAliases
from stagecut.passes.route import Route
from stagecut.passes.version_mutations import VersionMutations
from stagecut.tools.dump_ir.main import main

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        h = self.first(x)
        self.seen.add_(h.detach().sum(0))
        a = F.dropout(h, 0.5)
        b = F.dropout(h, 0.25)
        return self.second(a - b) + h

def make():
    torch.manual_seed(0)
    return Net(), (torch.randn(2, 4),), {}
"""

FAULTS: dict[str, tuple[type[Any], Callable[[Program], None], list[str]]] = {}


def fault(broken: type[Any], *shown: str) -> Callable[[Callable[[Program], None]], None]:
    """Adds what the decorated function does to a program, behind the pass `broken`; messages must show `shown`."""

    def add(change: Callable[[Program], None]) -> None:
        FAULTS[change.__name__] = broken, change, list(shown)

    return add


@fault(Liveness, "stage 1", "net.py:13", "aten.linear.default")
def drops_a_transfer(program: Program) -> None:
    dropped = next(t for t in program.transfers if t.value.hint == "linear")
    program.transfers.remove(dropped)


@fault(Partition, "stage 0", "net.py:17", "aten.sub.Tensor")
def swaps_two_operands(program: Program) -> None:
    op = next(op for op in program.all_ops() if op.target == "aten.sub.Tensor")
    op.set_operands(op.args[::-1], op.kwargs)


@fault(VersionMutations, "'seen'", "net.py:14", "aten.add_.Tensor")
def forgets_a_buffer_write(program: Program) -> None:
    op = next(op for op in program.ops if op.effects.writes)
    for old, new in op.versions.items():
        new.replace_uses(old)
    op.versions.clear()
    program.remove_ops({op})


@fault(ResolveAliases, "'first.weight'", "state")
def breaks_a_name(program: Program) -> None:
    next(e for e in program.state if e.name == "first.weight").names = ("first.wait",)


@fault(Partition, "net.py:16", "aten.dropout.default", "stage")
def mis_orders_random_draws(program: Program) -> None:
    ops = next(stage.ops for stage in program.stages if sum(op.effects.random for op in stage.ops) == 2)
    one, other = [i for i, op in enumerate(ops) if op.effects.random]
    ops[one], ops[other] = ops[other], ops[one]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return f"{path}:make"


def plant(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The pass has the fault; its name."""
    broken, change, _ = FAULTS[name]
    right = broken.run

    def run(self: Any, program: Program) -> bool:
        right(self, program)
        change(program)
        return True

    monkeypatch.setattr(broken, "run", run)
    return str(broken.name)


@pytest.mark.parametrize("option", ["--bisect", "--check-each"])
@pytest.mark.parametrize("name", FAULTS)
def test_the_pass_at_fault_is_named(
    name: str, option: str, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guilty = plant(name, monkeypatch)
    assert main([source, "--split-at", "second", option]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"after pass '{guilty}'" in shown.err
    for part in FAULTS[name][2]:
        assert part in shown.err, shown.err


def test_no_pass_is_at_fault(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([source, "--split-at", "second", "--bisect"]) == 0
    assert capsys.readouterr().out.startswith("no pass changes what the program computes: canonicalize, ")


def test_text_is_checked_on_random_inputs(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert main([source, "--passes", ""]) == 0
    text = tmp_path / "net.ir"
    text.write_text(capsys.readouterr().out)
    assert main([str(text), "--passes", "all", "--split-at", "second", "--bisect"]) == 0
    plant("swaps_two_operands", monkeypatch)
    assert main([str(text), "--passes", "all", "--split-at", "second", "--bisect"]) == 1
    assert "after pass 'partition'" in capsys.readouterr().err
    assert Route.name == "route"
