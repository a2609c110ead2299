"""The reference interpreter: runs a program at any phase on real tensors, the plain way.

It is the meaning of the IR, kept apart from the emitter: no generated code, no modules. Once stages list
their inputs and outputs it trusts nothing else, so a missing transfer or output shows as an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import reduce
from operator import getitem
from typing import Any

import torch

from stagecut.ir.aliases import unwritten
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import (
    BY_MODE,
    WHOLE,
    Block,
    Context,
    Kind,
    Mode,
    Op,
    Program,
    RegionRef,
    StateEntry,
    Token,
    Value,
    function_of,
    transform,
)
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.objects import opened
from stagecut.ir.run.targets import attribute, check_op, constant, resolve

Environment = dict[Value, Any]


Watch = Callable[[Op, list[Any]], None]
"""A function that is called with each op that ran, and its results."""


def run(
    program: Program,
    inputs: Sequence[Any],
    tensors: Mapping[str, torch.Tensor],
    bindings: Bindings | None = None,
    watch: Watch = lambda op, results: None,
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The flat outputs of `program` on flat `inputs`, and the state by name afterwards.

    `tensors` gives every state name its tensor; they are cloned first (tied names once), so neither they nor
    `inputs` change. Autograd runs through the clones. `bindings` is needed for user functions and modules.
    Raises StagecutError when an op or a stage reads what is not there.
    """
    memo: dict[int, torch.Tensor] = {}
    state = {name: _cloned(tensor, memo) for name, tensor in tensors.items()}
    env: Environment = {entry.value: state[entry.name] for entry in program.state}
    fed = {
        value: _cloned(argument, memo)
        for value, argument in zip(program.inputs, inputs, strict=True)
    }
    machine = Machine(bindings or Bindings(), watch)
    if any(stage.inputs or stage.outputs for stage in program.stages):
        _run_linked(program, machine, env, fed)
    else:
        env |= fed
        machine.run(program.all_ops(), env)
    outputs = [machine.lookup(leaf, env) for leaf in program.outputs]
    return outputs, state


def _cloned(argument: Any, memo: dict[int, torch.Tensor]) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    if id(argument) not in memo:
        clone = argument.detach().clone()
        memo[id(argument)] = clone.requires_grad_(argument.requires_grad)
    return memo[id(argument)]


def _run_linked(
    program: Program, machine: Machine, env: Environment, fed: Environment
) -> None:
    sent: Environment = dict(fed)
    for stage in program.stages:
        arriving = {
            transfer.value
            for transfer in program.transfers
            if transfer.target == stage.index and transfer.recomputed is None
        }
        local: Environment = {entry.value: env[entry.value] for entry in stage.state}
        for value in stage.inputs:
            if value not in arriving or value not in sent:
                where = value.owner.where() if isinstance(value.owner, Op) else ""
                raise StagecutError(
                    f"stage {stage.index} waits for {value!r}, which nothing sends",
                    where=where,
                )
            local[value] = sent[value]
        sent |= zip(stage.outputs, machine.call(stage, local), strict=True)
    env |= sent


class Machine:
    """Executes ops one by one in an environment of values."""

    def __init__(
        self, bindings: Bindings, watch: Watch = lambda op, results: None
    ) -> None:
        self._bindings = bindings
        self._watch = watch

    def run(self, ops: Iterable[Op], env: Environment) -> None:
        for op in ops:
            if op.is_split:
                continue
            with ExitStack() as stack:
                for context in op.context:
                    stack.enter_context(enter(context))
                self._op(op, env)

    def _op(self, op: Op, env: Environment) -> None:
        try:
            results = _flat(op, self.apply(op, env))
        except StagecutError:
            raise
        except Exception as error:  # anything that torch's or a user's op may raise
            raise StagecutError(
                f"{op.target} cannot run: {type(error).__name__}: {error}",
                where=op.where(),
            ) from error
        env.update(zip(op.results, results, strict=True))
        for old, new in op.versions.items():
            env[new] = self.lookup(old, env)
        self._watch(op, results)

    def apply(self, op: Op, env: Environment) -> Any:
        """The result of the op for the operands in `env`."""
        functions = [self._function(region) for region in op.regions]
        args, kwargs = (
            transform(tree, lambda leaf: self._leaf(leaf, env, functions))
            for tree in (op.args, op.kwargs)
        )
        function = function_of(op)
        if function is not None:
            operands, state = args
            env = dict(zip(function.sees, (*operands, *state), strict=True))
            return self.call(function, env)
        check_op(op)
        kind, name = op.target.kind, op.target.name
        if kind is Kind.METHOD:
            return getattr(args[0], name)(*args[1:], **kwargs)
        if op.target == "builtins.getattr":
            return attribute(*args, **kwargs)
        if op.target == BY_MODE:
            training, in_training, in_evaluation, operands = args
            return (in_training if training else in_evaluation)(*operands)
        if kind is Kind.EXTERN:
            return self._bindings.functions[op.target](*args, **kwargs)
        if kind is Kind.MODULE:
            return self._module(name, args, op, env)
        return resolve(op.target)(*args, **kwargs)

    def _module(self, path: str, args: Any, op: Op, env: Environment) -> Any:
        own: dict[str, torch.Tensor] = {}
        for value in op.args[2]:
            entry = unwritten(value).owner
            names = entry.names if isinstance(entry, StateEntry) else ()
            own |= {
                name.removeprefix(f"{path}."): env[value]
                for name in names
                if name.startswith(f"{path}.")
            }
        return torch.func.functional_call(
            self._bindings.modules[path],
            own,
            tuple(args[0]),
            dict(args[1]),
            tie_weights=False,
        )

    def call(self, block: Block, env: Environment) -> Any:
        """The outputs of the block in an environment that has its inputs."""
        self.run(block.ops, env)
        return transform(block.outputs, lambda leaf: self._leaf(leaf, env, []))

    def _function(self, region: Block) -> Callable[..., Any]:
        return lambda *operands: self.call(
            region, dict(zip(region.inputs, operands, strict=True))
        )

    def lookup(self, leaf: Any, env: Environment) -> Any:
        """The tensor behind a value, the object behind a literal. StagecutError when it is not there."""
        if isinstance(leaf, Value) and leaf not in env:
            raise StagecutError(f"{leaf!r} is read but not available")
        return env[leaf] if isinstance(leaf, Value) else leaf

    def _leaf(
        self, leaf: Any, env: Environment, functions: list[Callable[..., Any]]
    ) -> Any:
        if isinstance(leaf, RegionRef):
            return functions[leaf.index]
        if isinstance(leaf, Mode):
            return leaf.in_trace
        if isinstance(leaf, Token):
            return constant(leaf)
        return self.lookup(leaf, env)


def enter(context: Context) -> Any:
    """The torch context manager of a context."""
    if context.kind in WHOLE:
        return nullcontext()
    if context.kind == "autocast":
        args = [
            constant(argument) if isinstance(argument, Token) else argument
            for argument in context.args
        ]
        return torch.autocast(*args)
    return {
        "no_grad": torch.no_grad,
        "enable_grad": torch.enable_grad,
        "inference_mode": torch.inference_mode,
    }[context.kind]()


def _flat(op: Op, result: Any) -> list[Any]:
    """The results of an op, in the order the op lists them."""
    if not op.results:
        return []
    if op.returned is not None:
        leaves = torch.utils._pytree.tree_leaves(opened(result))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if op.form is not None:
        return [reduce(getitem, path, result) for _, path in op.form.paths()]
    return [result] if len(op.results) == 1 else list(result)
