"""What the fuzzer holds a pipe to. Every check returns what is wrong, one line each; none is found when the list is empty.

Checks take the model itself, not a plan: a reproducer calls them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from by_graphs import ByGraphs, Packed
from compare import APART, Call, Near, Posted, Seen, differences, observe, observe_all
from torch import nn

from stagecut.ir.aliases import Aliases
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import ModeError, StagecutError
from stagecut.ir.graph import BY_MODE, Mode, Op, Program, Value
from stagecut.ir.ops import facts, flag
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.interp import run
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.ir.types import TensorType
from stagecut.passes.find_splits import FindSplits
from stagecut.passes.pipeline import default_pipeline
from stagecut.passes.runner import run_passes
from stagecut.pipe import Pipe

# --- stages ---------------------------------------------------------------------------------------------


def boundaries(pipe: Pipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Where what a stage returns is not of the type that the IR gives it.

    A view made under no_grad says that it requires grad, and so does what comes of it, though nothing flows through it. What a
    module kept whole does inside is not known, and what differs by mode carries gradient where it does in one of the two: a dropout that is
    off returns what it gets, so that a write into it is seen there. It returns the strides too; in a trace it does not.
    Of a batch norm of what is not contiguous, a trace has other strides than a run.
    """
    wrong: list[str] = []
    off = any(facts(op).off_is_operand and flag(op) in (False, Mode(False)) for op in pipe.program.all_ops())
    off = off or _strides_of_a_norm(pipe.program)
    whole = any(op.is_users or op.target == BY_MODE for op in pipe.program.all_ops())
    whole = whole or any(isinstance(arg, Mode) for op in pipe.program.all_ops() for arg in op.args)
    detached = any(context.kind == "no_grad" for op in pipe.program.all_ops() for context in op.context)
    for stage, block in zip(pipe.stages, pipe.program.stages, strict=True):

        def look(module: nn.Module, inputs: Any, result: Any, outputs: list[Value] = block.outputs) -> None:
            items = result if len(outputs) != 1 else (result,)
            for value, item in zip(outputs, items if outputs else (), strict=True):
                kind = value.type
                if not isinstance(kind, TensorType):
                    continue
                shape = [n if isinstance(n, int) else m for n, m in zip(kind.shape, item.shape, strict=True)]
                if list(item.shape) != shape or (kind.strides is None and not item.is_contiguous() and not off):
                    wrong.append(f"{value!r} is {kind}, but {list(item.shape)} with strides {item.stride()} comes out")
                if (kind.grad and not item.requires_grad and not whole) or (item.requires_grad and not kind.grad and not detached):
                    wrong.append(f"{value!r} is {kind}, but requires_grad is {item.requires_grad}")

        stage.register_forward_hook(look)
    pipe(*args, **kwargs)
    return wrong


def _strides_of_a_norm(program: Program) -> bool:
    """True where a batch norm reads what is not contiguous: a trace says that its result lies as its operand does, and on a CPU it does
    not."""
    return any(facts(op).statistics and getattr(op.operands[0].type, "strides", None) for op in program.all_ops())


def verified(pipe: Pipe, call: Call) -> list[str]:
    """What the pipe's own comparison with its model says."""
    return [f"verify: {line}" for line in pipe.verify(*call[0], **call[1]).differences]


# --- the program --------------------------------------------------------------------------------------


def round_trip(program: Program) -> list[str]:
    """What is wrong with the text form: it must read back valid and print the same."""
    printed = text(program)
    again = parse(printed)
    verify(again)
    return ["the text reads back as another program"] * (text(again) != printed)


def interpret(program: Program, bindings: Bindings, flat: list[Any]) -> Seen:
    """What the reference interpreter makes of a program."""
    torch.default_generator.manual_seed(5)
    outputs, state = run(program, flat, bindings.tensors, bindings)
    found = {f"output {i}": o.detach().clone() if isinstance(o, torch.Tensor) else o for i, o in enumerate(outputs)}
    return found | {f"state {n}": t.detach() for n, t in state.items()} | {"random state": torch.get_rng_state()}


def passes(lowered: Callable[[], tuple[Program, Bindings]], splits: FindSplits, flat: list[Any]) -> list[str]:
    """What single passes change: the interpreter must find the same before and after each, and the text must read back."""
    program, bindings = lowered()
    expected = interpret(program, bindings, flat)
    wrong = round_trip(program)

    def after(record: Any, p: Program) -> None:
        wrong.extend(f"after {record.name}: {line}" for line in differences(expected, interpret(p, bindings, flat)) + round_trip(p))

    run_passes(program, default_pipeline(splits), check=True, after=after)
    return wrong


def shuffled(lowered: Callable[[], tuple[Program, Bindings]], splits: FindSplits, flat: list[Any], seed: int) -> list[str]:
    """What the order of independent ops changes: a program in another order must mean the same after all passes."""
    program, bindings = lowered()
    expected = interpret(program, bindings, flat)
    program.ops = shuffle(program, random.Random(seed))
    wrong = [f"shuffled: {line}" for line in differences(expected, interpret(program, bindings, flat))]
    if wrong:
        return wrong
    run_passes(program, default_pipeline(splits), check=True)
    return [f"shuffled, after all passes: {line}" for line in differences(expected, interpret(program, bindings, flat))]


def shuffle(program: Program, rng: random.Random) -> list[Op]:
    """The ops in another order: uses behind definitions, effects in order, reads and writes of one storage in order."""
    root = Aliases(program.ops, program.state).root
    waits: dict[Op, set[Op]] = {}
    home = {r: op for op in program.ops for r in op.results}
    written: dict[Value, list[Op]] = {}
    touched: dict[Value, list[Op]] = {}
    last: Op | None = None
    for op in program.ops:
        before = {home[v] for v in op.operands if v in home}
        places = {root(value) for value in (*op.operands, *op.results)}
        writes = set(map(root, op.effects.writes))
        before |= {o for place in places for o in written.get(place, ())} | {o for place in writes for o in touched.get(place, ())}
        if op.has_effect or op.is_split:
            before |= {last} if last is not None else set()
            last = op
        for place in places:
            touched.setdefault(place, []).append(op)
        for place in writes:
            written.setdefault(place, []).append(op)
        waits[op] = before - {op}
    return _any_order(waits, rng)


def _any_order(waits: dict[Op, set[Op]], rng: random.Random) -> list[Op]:
    found: list[Op] = []
    left = dict(waits)
    done: set[Op] = set()
    while left:
        ready = [op for op, before in left.items() if before <= done]
        picked = rng.choice(ready)
        found.append(picked)
        done.add(picked)
        del left[picked]
    return found


# --- separate processes -------------------------------------------------------------------------------


def mailbox(model: nn.Module, pipe: Pipe, call: Call, other: Call, near: Near) -> list[str]:
    """What differs when stages share nothing but what is sent. `call` goes to the model, `other`, which is equal, to the stages.

    Raises StagecutError when the program cannot run like that.
    """
    posted = Posted(pipe)
    # a view made under no_grad says that it requires grad, though nothing flows through it
    return differences(observe(model, call), observe(posted, other), replace(near, gradient_strides=False, requires_grad=False), APART)


def switched(model: nn.Module, pipe: Pipe, call: Call, other: Call, near: Near) -> list[str]:
    """What differs as in `mailbox` when both are switched to the other mode. Nothing where the stages say that they cannot be, or where
    the model fails in that mode."""
    mode = not pipe.training
    if not _runs(copy.deepcopy(model).train(mode), copy.deepcopy(call)):
        return []
    flags = [(part, part.training) for part in (pipe, *(part for stage in pipe.stages for part in stage.modules()))]
    try:
        return mailbox(model.train(mode), pipe.train(mode), call, other, near)
    except ModeError:
        return []
    finally:
        for part, flag in flags:
            part.training = flag


# --- the backward ---------------------------------------------------------------------------------------


def backward(pipe: Pipe, calls: Callable[[], list[Call]], recompute: bool) -> tuple[list[str], list[str]]:
    """What differs when the stages run by graphs instead of by autograd; and of each stage why no graphs ran it, '' where they did.

    Nothing may, to the bit. An output that is a view has no gaps when it comes from a graph, and one that was made under no_grad may say
    that it requires grad, though nothing flows through it. The gradient of a norm of which a trace has other strides is summed in another
    order: graphs lay out what they are given as the trace had it.

    Raises StagecutError when the stages cannot run apart under autograd either.
    """
    near = Near(gradients=None if _strides_of_a_norm(pipe.program) else 0.0, gaps=False, requires_grad=False)
    expected = observe_all(Packed(pipe), calls())
    graphs = ByGraphs(pipe, recompute)
    try:
        return differences(expected, observe_all(graphs, calls()), near), graphs.notes
    except StagecutError as error:
        return [f"only by graphs, {type(error).__name__}: {error}"], []


def _runs(model: nn.Module, call: Call) -> bool:
    """True when forward and backward go through."""
    try:
        observe(model, call)
    except Exception:
        return False
    return True
