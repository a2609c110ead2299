"""Compiles to show: a history and a program, from IR text."""

from __future__ import annotations

from helpers import load

from stagecut.ir.graph import Program
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.passes.pipeline import default_pipeline
from stagecut.passes.runner import run_passes

History = list[tuple[str, str, float]]
BAD = "<img src=x onerror=window.hacked=1>"
CLOSE = "</script><script>window.hacked=1</script><!--"


def compiled(program: Program) -> tuple[History, Program]:
    """The history of all passes over a traced program, and what they made of it."""
    history: History = [("input", text(program), 0.0)]
    run_passes(program, default_pipeline(), after=lambda record, now: history.append((record.name, text(now), 0.001)))
    return history, program


def linked() -> tuple[History, Program]:
    """A program that is linked from the start, with one pass that did nothing."""
    program = load("linked")
    return [("input", text(program), 0.0), ("nothing", text(program), 0.001)], program


def tampered() -> tuple[History, Program]:
    """Every name that a user has a say in is a piece of HTML."""
    program = parse(f"""\
program @"{CLOSE}" phase=traced {{
  file net.py "/tmp/{BAD}/net.py"
  input %x : f32[4]
  state @"{BAD}" : param f32[4] grad names(@"{CLOSE}")
  %a = aten.mul.Tensor(%x, @"{BAD}", "{BAD}{CLOSE}") : f32[4] in "{BAD}"/"{CLOSE}" at net.py:3
  split at net.py:4
  %b = module."{BAD}"(%a) : f32[4] in "{BAD}" at net.py:5
  %c = aten.mul.Tensor(%b, @"{BAD}") : f32[4] at net.py:6
  output (%c,)
}}
""")
    return compiled(program)


def long(ops: int = 4000, stages: int = 4) -> tuple[History, Program]:
    """A chain of many ops in modules, with dead ones, a skip connection and guards between them."""
    lines = [
        "program @Long phase=traced {",
        '  file net.py "/src/net.py"',
        "  input %x : f32[4]",
        "  %skip = aten.neg.default(%x) : f32[4] in stem at net.py:1",
    ]
    last = "skip"
    for i in range(ops):
        if i and i % (ops // stages) == 0:
            lines.append(f"  split at net.py:{i}")
        if i % 900 == 700:
            lines.append(f"  %dead{i} = aten.neg.default(%{last}) : f32[4] at net.py:9")
        lines.append(f"  %v{i} = aten.relu.default(%{last}) : f32[4] in layers.{i // 100} at net.py:{10 + i % 50}")
        last = f"v{i}"
    lines += [f"  %end = aten.add.Tensor(%{last}, %skip) : f32[4] in head at net.py:99", "  output (%end,)", "}", ""]
    return compiled(parse("\n".join(lines)))
