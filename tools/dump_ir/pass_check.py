"""Runs a program with the reference interpreter before and after each pass, and names the op that computes
something else.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stagecut.ir.aliases import writes_of
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import InputError, StagecutError
from stagecut.ir.graph import Op, Program
from stagecut.ir.ops import facts
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.interp import run
from stagecut.ir.text.printer import line_of
from stagecut.ir.types import DTYPES, ScalarType, TensorType
from stagecut.passes.base import Pass
from stagecut.passes.runner import PassRecord, run_passes

SEED = 5
TOLERANCE = 1e-4
"""Relative: gradients of several uses may be summed in another order."""


@dataclass(frozen=True)
class Feed:
    """The data that a program runs on: flat inputs, and the bindings of its names; `drawn` where they are
    random.
    """

    inputs: Sequence[Any]
    bindings: Bindings
    drawn: bool = False


@dataclass
class Run:
    """The results of one run: results of every op, outputs, state by name and who wrote it, gradients of
    trained state, the random state.
    """

    results: dict[Op, list[Any]] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    random: torch.Tensor = field(default_factory=torch.get_rng_state)
    writers: dict[str, Op] = field(default_factory=dict)


class Difference(StagecutError):
    """A pass changed what the program computes."""


def interpret(program: Program, feed: Feed) -> Run:
    """One run of the reference interpreter, forward and backward. The global random state is the same as
    before.
    """
    _check_feed(program, feed)
    result = Run(writers=_writers(program))

    def watch(op: Op, results: list[Any]) -> None:
        result.results[op] = [_kept(value) for value in results]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        outputs, state = run(
            program, feed.inputs, feed.bindings.tensors, feed.bindings, watch
        )
        result.random = torch.get_rng_state()
    result.outputs = [_kept(value) for value in outputs]
    result.state = {name: _kept(tensor) for name, tensor in state.items()}
    result.gradients = _gradients(
        outputs,
        {name: tensor for name, tensor in state.items() if tensor.requires_grad},
    )
    return result


def _check_feed(program: Program, feed: Feed) -> None:
    """Raises where tensors have no values, and where the names of the state are not those of the model."""
    values = [*feed.inputs, *feed.bindings.tensors.values()]
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in values):
        raise InputError(
            "the program is to be run, and its tensors have no values: they are on the meta device",
            hint="check a small one",
        )
    names = program.name_owners().keys()
    for name in feed.bindings.tensors:
        if name not in names:
            raise Difference(
                f"the name '{name}' is gone from the program's state",
                where=f"state '{name}'",
            )
    for name in names:
        if name not in feed.bindings.tensors:
            raise Difference(f"the model has no '{name}'", where=f"state '{name}'")


def _gradients(
    outputs: list[Any], trained: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    """Gradients by name; none where the model cannot go backward, such as a model that overwrites what its
    backward needs.
    """
    losses = [
        output.float().sum()
        for output in outputs
        if isinstance(output, torch.Tensor)
        and output.requires_grad
        and not output.is_complex()
    ]
    if not losses or not trained:
        return {}
    try:
        gradients = torch.autograd.grad(
            losses, list(trained.values()), allow_unused=True
        )
    except RuntimeError:
        return {}
    return dict(zip(trained, gradients, strict=True))


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def compare(program: Program, before: Run, after: Run) -> None:
    """Raises Difference at the first op of `program`, output, state or gradient that differs from before."""
    stages = {op: stage.index for stage in program.stages for op in stage.ops}
    _compare_ops(program, before, after, stages)
    _compare_state(before, after, stages)
    for place, (old, new) in enumerate(zip(before.outputs, after.outputs, strict=True)):
        if not _are_equal(old, new):
            owner = getattr(program.outputs[place], "owner", None)
            raise Difference(
                f"output {place} is something else",
                where=_where(owner, stages) if isinstance(owner, Op) else "",
            )
    if not torch.equal(before.random, after.random):
        raise Difference("random numbers are drawn otherwise")
    for name, gradient in before.gradients.items():
        if name in after.gradients and not _close(gradient, after.gradients[name]):
            raise Difference(
                f"the gradient of '{name}' differs", where=f"state '{name}'"
            )


def _compare_ops(
    program: Program, before: Run, after: Run, stages: dict[Op, int]
) -> None:
    for op, results in after.results.items():
        wanted = before.results.get(op)
        if wanted is None or facts(op).uninitialised:
            continue
        if not all(map(_are_equal, wanted, results)):
            raise Difference(
                f"{line_of(program, op).strip()}\n  computes something else than before",
                where=_where(op, stages),
            )


def _compare_state(before: Run, after: Run, stages: dict[Op, int]) -> None:
    for name, tensor in before.state.items():
        if _are_equal(tensor, after.state.get(name)):
            continue
        writer = before.writers.get(name) or after.writers.get(name)
        what = f"'{name}' holds something else afterwards"
        if writer is None:
            raise Difference(what, where=f"state '{name}'")
        if writer not in after.results:
            what += f": {writer.target}, which wrote it, is gone"
        raise Difference(what, where=_where(writer, stages))


def _where(op: Op, stages: dict[Op, int]) -> str:
    return (f"stage {stages[op]}, " if op in stages else "") + op.where()


def _writers(program: Program) -> dict[str, Op]:
    """State name -> the last op that writes it, through any versions and views."""
    names = {entry.value: entry.names for entry in program.state}
    return {
        name: op
        for op, value in writes_of(program.all_ops(), names)
        for name in names[value]
    }


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        if (
            not isinstance(other, torch.Tensor)
            or one.dtype != other.dtype
            or one.shape != other.shape
        ):
            return False
        if one.is_meta:
            return True
        return bool(((one == other) | (one.isnan() & other.isnan())).all())
    return not isinstance(one, (bool, int, float, str)) or repr(one) == repr(other)


def _close(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    scale = float(one.abs().nan_to_num(0, 0, 0).max()) if one.numel() else 1.0
    return torch.allclose(
        one, other, rtol=TOLERANCE, atol=TOLERANCE * max(1.0, scale), equal_nan=True
    )


def check_passes(
    program: Program,
    passes: Sequence[Pass],
    feed: Feed,
    after: Callable[[PassRecord, Program], None],
) -> None:
    """Runs passes as run_passes does, with a run of the interpreter before and after each.

    Raises Difference at the first pass that changes what the program computes; its message names op, stage
    and source line.
    """
    try:
        last = interpret(program, feed)
    except StagecutError as error:
        if not feed.drawn:
            raise
        what = f"the program cannot run on random inputs, and text holds no others: {error.what}"
        raise InputError(
            what, where=error.where, hint="check the model that the text is of"
        ) from error

    def check(record: PassRecord, program: Program) -> None:
        nonlocal last
        try:
            result = interpret(program, feed)
            compare(program, last, result)
            verify(program, after=record.name)
        except StagecutError as error:
            raise Difference(
                f"after pass '{record.name}': {error.what}",
                where=error.where,
                hint=error.hint,
            ) from error
        last = result
        after(record, program)

    run_passes(program, passes, after=check)


def random_feed(program: Program) -> Feed:
    """Random inputs and state for a program that was read as text. Sizes that vary become 3.

    Raises InputError when a value is not a tensor or the text calls something that text cannot hold.
    """
    generator = torch.Generator().manual_seed(SEED)
    bindings = Bindings()
    for op in program.all_ops():
        if op.is_users:
            raise InputError(
                f"{op.target} is the user's own code, which IR text does not hold",
                where=op.where(),
            )
    for entry in program.state:
        tensor = _random(entry.name, entry.type, generator)
        tensor.requires_grad_(entry.requires_grad)
        bindings.tensors |= dict.fromkeys(entry.names, tensor)
    inputs = [_random(value.hint, value.type, generator) for value in program.inputs]
    return Feed(inputs, bindings, drawn=True)


def _random(name: str, value_type: Any, generator: torch.Generator) -> Any:
    if isinstance(value_type, ScalarType):
        return _scalar(name, value_type)
    if not isinstance(value_type, TensorType):
        raise InputError(f"'{name}' is {value_type}: no random value is known for it")
    shape = [size if isinstance(size, int) else 3 for size in value_type.shape]
    dtype = getattr(torch, DTYPES[value_type.dtype])
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _scalar(name: str, scalar: ScalarType) -> Any:
    if scalar.kind == "int":
        return int(scalar.expr) if scalar.expr and scalar.expr.isdigit() else 3
    if scalar.kind == "none":
        return None
    if scalar.kind in ("float", "bool", "str", "complex") and scalar.expr is not None:
        return literal_eval(scalar.expr)
    raise InputError(f"'{name}' is {scalar}: no random value is known for it")
