"""The backward of a stage as compiled functions: `Driver(..., backward="graph")`.

A stage runs as an autograd.Function. Its backward computes the gradients of the inputs, and leaves a function
that computes those of the weights: the schedule says when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel

from stagecut.backend.stages.memory import REFUSALS, TracedStage
from stagecut.backend.stages.modules import Stage, StageModule
from stagecut.backend.stages.pure import PureStage
from stagecut.backend.stages.roles import Function, RoleCode
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import BudgetError, RolesError
from stagecut.ir.graph import Value
from stagecut.ir.roles import Budget, Roles, Saved
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.storage import storage_of
from stagecut.ir.types import DTYPES, TensorType

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class _Gradient:
    """The place of a gradient among the results of its role, and the tangents that it depends on."""

    place: int
    tangents: frozenset[int]


class Split:
    """The three functions of a stage for tensors of one signature, and what is passed between them."""

    def __init__(
        self, roles: Roles, bindings: Bindings, code: RoleCode, outputs: int
    ) -> None:
        joint = roles.joint
        self.outputs = outputs
        self.memory = roles.memory
        self._functions: list[Function] = [
            code.function(block, bindings)
            for block in (roles.forward, roles.backward_input, roles.backward_weight)
        ]
        primals = list(joint.primals)
        saved = roles.saved
        first = [*primals, *roles.forward.outputs]
        second = [*saved, *joint.cotangents, *roles.backward_input.outputs]
        self._forward_reads = _places(roles.forward.inputs, primals)
        self._saves = _places(saved, first)
        self._keeps = frozenset(self._saves)
        self._returns = _places(
            joint.block.outputs[: joint.results],
            first,
        )
        self._input_reads = _places(roles.backward_input.inputs, second)
        self._weight_reads = _places(roles.backward_weight.inputs, second)
        self.tangents = joint.tangents
        self._tangent_types = [value.type for value in joint.cotangents]
        depends = _tangents_of(roles)
        self.gradients: list[_Gradient | None] = []
        for place, value in enumerate(joint.gradients):
            weight = place in joint.weights
            role = roles.backward_weight if weight else roles.backward_input
            self.gradients.append(
                None
                if value is None
                else _Gradient(role.outputs.index(value), depends[value])
            )

    def keeps(self, place: int) -> bool:
        """Whether the backward reads the argument of forward at this place."""
        return place in self._keeps

    def forward(self, primals: Tensors) -> tuple[list[torch.Tensor], Tensors]:
        """The results, the written state last, and the tensors that the backward needs."""
        known = [*primals]
        known += _called(
            self._functions[0],
            [primals[i] for i in self._forward_reads],
        )
        results = [known[place] for place in self._returns]
        return results, [known[place] for place in self._saves]

    def backward_input(self, saved: Tensors, tangents: Tensors) -> tuple[Any, Tensors]:
        """The gradients of inputs, and what the gradients of the weights need."""
        known = [*saved, *tangents]
        results = _called(
            self._functions[1],
            [known[i] for i in self._input_reads],
        )
        known += results
        return results, [known[place] for place in self._weight_reads]

    def backward_weight(self, needed: Tensors) -> Sequence[Any]:
        """The gradients of weights."""
        return _called(self._functions[2], needed)

    def tangent(
        self, number: int, grad: torch.Tensor | None, device: torch.device
    ) -> Any:
        """A gradient of a result, which lies on `device`, as the backward takes it: zeros for none, its
        elements where the trace had them.
        """
        tangent_type = self._tangent_types[number]
        assert isinstance(tangent_type, TensorType)
        if grad is None:
            shape: Any = tangent_type.shape
            return torch.zeros(shape, dtype=_dtype(tangent_type), device=device)
        strides: Any = tangent_type.strides
        if strides is None:
            return grad.contiguous()
        if grad.stride() == strides:
            return grad
        laid: Any = torch.empty_strided(
            grad.shape, strides, dtype=grad.dtype, device=grad.device
        )
        return laid.copy_(grad)


def _called(function: Function, arguments: Tensors) -> tuple[Any, ...]:
    result = function(*arguments)
    if result is None:
        return ()
    return result if isinstance(result, tuple) else (result,)


def _dtype(tensor_type: TensorType) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES[tensor_type.dtype])
    return dtype


def _places(values: Sequence[Value], among: Sequence[Value]) -> list[int]:
    """Where each of some values stands among others."""
    places = {value: place for place, value in reversed([*enumerate(among)])}
    return [places[value] for value in values]


def _tangents_of(roles: Roles) -> dict[Value, frozenset[int]]:
    """Value -> the tangents that it depends on, by number."""
    depends = {
        value: frozenset([number])
        for number, value in enumerate(roles.joint.cotangents)
    }
    none: frozenset[int] = frozenset()
    for op in roles.joint.block.ops:
        of_op = none.union(*(depends.get(value, none) for value in op.reads))
        depends |= dict.fromkeys(op.results, of_op)
    for gradient in roles.joint.gradients:
        if gradient is not None:
            depends.setdefault(gradient, none)
    return depends


class Graphs:
    """One stage of a pipe, run by graphs, which are made at their first use for each signature.

    With `recompute`, the backward computes ops again, so that less is saved. `stage`: a copy that runs in the
    place of the pipe's own. `note` says why the stage runs by autograd, '' while it does not. `title` is the
    stage in an error.
    """

    def __init__(
        self,
        pipe: Staged,
        index: int,
        code: RoleCode,
        recompute: bool | Budget = False,
        stage: Stage | None = None,
    ) -> None:
        self._pipe = pipe
        self.recompute = recompute
        self.title = f"stage {index}"
        self._stage = stage or pipe.stages[index]
        self._block = pipe.program.stages[index]
        self._code = code
        self._splits: dict[Any, Split | str] = {}
        self._anchor = torch.empty(0, requires_grad=True)
        self._pure: PureStage | None = None
        self._refused = ""
        self._state: list[torch.Tensor] = []
        self._state_key: Any = None
        self.note = ""
        self.left: Callable[[], None] = _nothing

    def begin(self, module: torch.nn.Module) -> None:
        """A step begins, in which `module` stands for the stage."""
        self.left = _nothing
        if self._pure is None and not self._refused:
            try:
                self._pure = PureStage(self._stage, self._block)
            except RolesError as error:
                self._refused = str(error)
        self.note = self._refused or _why_not_plain(module, self._stage)
        if self.note or self._pure is None:
            return
        flags = [part.training for part in self._stage.modules()]
        signatures = [_signature(slot.tensor) for slot in self._pure.slots]
        self._state_key = (*flags, *signatures)

    def run(
        self, inputs: Sequence[Any], handed_on: tuple[int, ...] = ()
    ) -> tuple[Any, ...] | None:
        """The outputs of the stage for these inputs, and after them the inputs at the places `handed_on`. Who
        reads these adds to the gradients of the inputs before the stage does, as autograd would have it.

        None where autograd runs the stage: there is a note why, or nothing carries gradient.
        """
        if self.note or self._pure is None or not torch.is_grad_enabled():
            return None
        state = [slot.tensor for slot in self._pure.slots]
        tensors = [*state, *inputs]
        if not any(tensor.requires_grad for tensor in tensors):
            return None
        split = self._split(tensors, inputs, handed_on)
        if split is None:
            return None
        outputs: tuple[Any, ...] = _Run.apply(
            self,
            split,
            state,
            self._anchor,
            *inputs,
        )
        return outputs

    def warm_up(self, inputs: Sequence[Any], handed_on: tuple[int, ...]) -> None:
        """The functions for such inputs are made, and have run forward and backward once, which compiles
        them. Gradients, state and random numbers are as they were. The inputs may be made up: a stage that
        cannot take them is left as it was.
        """
        if self.note or self._pure is None or not self._code.compiled:
            return
        written = [slot.tensor for slot in self._pure.slots if slot.written]
        before = [tensor.clone() for tensor in written]
        cards = {t.device for t in inputs if isinstance(t, torch.Tensor) and t.is_cuda}
        with torch.random.fork_rng(cards):
            try:
                self._run_once(inputs, handed_on)
            except BudgetError:
                raise
            except Exception:
                self.take_weights()
        with torch.no_grad():
            for tensor, content in zip(written, before, strict=True):
                tensor.copy_(content)

    def _run_once(self, inputs: Sequence[Any], handed_on: tuple[int, ...]) -> None:
        """All functions for these inputs have run."""
        with torch.enable_grad():
            outputs = self.run(inputs, handed_on) or ()
        carrying = [tensor for tensor in outputs if tensor.requires_grad]
        if not carrying:
            return
        with _without_autocast():
            grads = [torch.ones_like(tensor) for tensor in carrying]
            torch.autograd.backward(carrying, grads)
        left = self.take_weights()
        if isinstance(left, _Weights):
            left.grads()

    @property
    def saved(self) -> Saved | None:
        """What a micro-batch leaves in memory, the most of all sizes that ran; None where graphs ran none."""
        of_sizes = [s.memory for s in self._splits.values() if isinstance(s, Split)]
        return max(of_sizes, key=lambda saved: saved.forward, default=None)

    def take_weights(self) -> Callable[[], None]:
        """The function that adds the gradients of the weights of the backward that ran last. The next call
        gives one that does nothing, as after a backward that did not reach the stage.
        """
        left, self.left = self.left, _nothing
        return left

    def snapshot(self, state: Tensors, split: Split) -> list[torch.Tensor]:
        """The state. What forward writes is copied where the backward of this micro-batch reads it, as it is
        now.
        """
        assert self._pure is not None
        return [
            tensor.clone() if slot.written and split.keeps(place) else tensor
            for place, (slot, tensor) in enumerate(
                zip(self._pure.slots, state, strict=True)
            )
        ]

    def write(self, tensors: Tensors) -> None:
        """The written state has these contents."""
        assert self._pure is not None
        slots = [slot for slot in self._pure.slots if slot.written]
        for slot, tensor in zip(slots, tensors, strict=True):
            slot.tensor.copy_(tensor)

    def _split(
        self, tensors: Tensors, inputs: Tensors, handed_on: tuple[int, ...]
    ) -> Split | None:
        """The functions for these tensors. None with a note where there are none."""
        autocast = _autocasts()
        key = (self._state_key, autocast, handed_on, *map(_signature, inputs))
        if key not in self._splits:
            self._splits[key] = self._made(tensors, handed_on)
        split = self._splits[key]
        if isinstance(split, Split):
            return split
        self.note = split
        return None

    def _made(self, tensors: Tensors, handed_on: tuple[int, ...]) -> Split | str:
        """The functions for these tensors, or why there are none. Raises BudgetError."""
        assert self._pure is not None
        self._pure.handed_on = handed_on
        try:
            roles, bindings = TracedStage(self._pipe, self._pure, tensors).roles(
                self.recompute
            )
        except REFUSALS as error:
            return str(error)
        except BudgetError as error:
            raise error.at(self.title) from None
        outputs = len(self._block.outputs) + len(handed_on)
        return Split(roles, bindings, self._code, outputs)


def _nothing() -> None:
    """No gradients of weights are left to compute."""


class _Run(torch.autograd.Function):
    """One micro-batch of a stage."""

    @staticmethod
    def forward(
        ctx: Any,
        graphs: Graphs,
        split: Split,
        state: list[torch.Tensor],
        anchor: torch.Tensor,
        *inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        primals = [t.detach() for t in (*graphs.snapshot(state, split), *inputs)]
        # as in eager: some kernels keep what their backward needs in grad mode only
        with torch.enable_grad(), _without_autocast():
            results, saved = split.forward(primals)
        outputs = results[: split.outputs]
        graphs.write(results[split.outputs :])
        ctx.graphs, ctx.split, ctx.state = graphs, split, state
        ctx.devices = [results[place].device for place in split.tangents]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(
            *(t for i, t in enumerate(outputs) if i not in split.tangents)
        )
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        split: Split = ctx.split
        received = [grads[place] for place in split.tangents]
        live = {i for i, grad in enumerate(received) if grad is not None}
        count = len(ctx.state)
        skipped = (None, None, None, None)
        if not live:
            return *skipped, *(None for _ in split.gradients[count:])
        tangents = [
            split.tangent(number, grad, device)
            for number, (grad, device) in enumerate(
                zip(received, ctx.devices, strict=True)
            )
        ]
        with _without_autocast():
            results, needed = split.backward_input(ctx.saved_tensors, tangents)
        ctx.graphs.left = _Weights(split, ctx.state, needed, live)
        return *skipped, *_chosen(
            split.gradients[count:],
            results,
            live,
        )


class _Weights:
    """Adds the gradients of the weights of one micro-batch when it is called, once."""

    def __init__(
        self, split: Split, state: Tensors, needed: Tensors, live: set[int]
    ) -> None:
        self._split = split
        self._state = state
        self._needed = needed
        self._live = live

    def __call__(self) -> None:
        _accumulate(self.grads())

    def grads(self) -> dict[torch.Tensor, torch.Tensor]:
        """Weight -> gradient, which shares memory with nothing else that lives on."""
        needed, self._needed = self._needed, ()
        with torch.no_grad(), _without_autocast():
            results = self._split.backward_weight(needed)
        gradients = self._split.gradients[: len(self._state)]
        chosen = _chosen(gradients, results, self._live)
        taken = {storage_of(tensor) for tensor in needed}
        grads: dict[torch.Tensor, torch.Tensor] = {}
        for weight, grad in zip(self._state, chosen, strict=True):
            if grad is None:
                continue
            storage = storage_of(grad)
            grads[weight] = grad.clone() if storage in taken else grad
            taken.add(storage)
        return grads


class _Accumulate(torch.autograd.Function):
    """Its backward gives weights their gradients. Nobody else holds these, so that a weight that had none
    takes its own without a copy.
    """

    @staticmethod
    def forward(
        ctx: Any, grads: dict[torch.Tensor, torch.Tensor], *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.grads = grads
        return weights[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[Any, ...]:
        grads = [*ctx.grads.values()]
        ctx.grads.clear()
        return None, *grads


def _accumulate(grads: dict[torch.Tensor, torch.Tensor]) -> None:
    """Autograd adds the gradients to those of the weights, as it adds its own: in place, hooks included.
    `grads` is empty afterwards.
    """
    if not grads:
        return
    with torch.enable_grad():
        start: torch.Tensor = _Accumulate.apply(grads, *grads)
    start.backward(torch.empty_like(start))


def _chosen(
    gradients: Sequence[_Gradient | None], results: Sequence[Any], live: set[int]
) -> list[Any]:
    """The gradients among the results of a role; None where nothing that arrived leads to one."""
    return [
        None
        if gradient is None or live.isdisjoint(gradient.tangents)
        else results[gradient.place]
        for gradient in gradients
    ]


def _signature(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that the graph of a stage takes from a tensor but its contents."""
    return (
        tensor.shape,
        tensor.dtype,
        tensor.stride(),
        tensor.device,
        tensor.requires_grad,
    )


def _autocasts() -> tuple[Any, ...]:
    """The autocasts that are on, with their dtypes."""
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    )


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Inside, no autocast casts: the ops of a graph have their casts."""
    with ExitStack() as stack:
        for kind, _ in _autocasts():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _why_not_plain(module: torch.nn.Module, stage: Stage) -> str:
    """Why a graph cannot stand for a stage as it is now; '' where it can."""
    if isinstance(module, DistributedDataParallel) and module.module is stage:
        reason = _why_not_averaged(module)
        if reason:
            return f"DistributedDataParallel {reason}"
    elif module is not stage:
        return f"wrap returned a {type(module).__name__}, which runs around the stage"
    if torch_module._has_any_global_hook():
        return "hooks are registered for all modules"
    for path, part in stage.named_modules():
        if not isinstance(part, StageModule) or isinstance(part, FSDPModule):
            return f"'{path}' is a {type(part).__name__}: it was wrapped, or kept whole"
        if part._compiled_call_impl is not None:
            return f"'{path}' was compiled"
        if _has_hooks(part):
            return f"'{path}' has hooks, which a graph would not call"
    return ""


def _why_not_averaged(module: DistributedDataParallel) -> str:
    """What this DDP does besides averaging the gradients of all its weights; '' for nothing."""
    if module.find_unused_parameters or module.static_graph:
        return "looks for the weights that forward uses"
    if module.broadcast_buffers and module.modules_buffers:
        return "sends buffers in forward: give it broadcast_buffers=False"
    if module.mixed_precision is not None:
        return "casts: give the Driver mixed precision instead"
    return "has hooks" if _has_hooks(module) else ""


def _has_hooks(module: torch.nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
