"""The cost of every op of a program: FLOPs, bytes moved, bytes kept for the backward, seconds on a device.

FLOPs are counted by torch's own formulas: each distinct op runs once on the meta device under
`torch.utils.flop_counter.FlopCounterMode`, forward and backward. Autograd's hooks for saved tensors show
there what it keeps. Seconds are those of a roofline, the larger of computing and moving, or measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from stagecut.ir.aliases import storage_root
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import InputError, nearest
from stagecut.ir.graph import Op, Program, StateEntry, Value, transform
from stagecut.ir.keywords import near_names_in
from stagecut.ir.ops import facts
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.interp import Machine, enter
from stagecut.ir.run.storage import storage_of
from stagecut.ir.sizes import evaluate
from stagecut.ir.types import (
    DTYPES,
    Dim,
    TensorType,
    Type,
    carries_grad,
    dtype_bytes,
)

Sizes = Mapping[str, int]


@near_names_in
@dataclass(frozen=True)
class Device:
    """An accelerator as a roofline model describes it. `name` is for tables.

    flops: of 16-bit matrix products per second (32-bit ones take twice, 64-bit ones eight times as long).
    bandwidth, link_bandwidth: bytes per second of its memory, and to a neighbour, one way. memory: bytes.
    overhead: seconds that starting an op takes. reached: the part of `flops` that large matrix products
    reach. link_latency: seconds that a message takes besides its bytes. starting, posting: seconds in which
    the host starts an op, and posts messages. slowed: the part by which it computes more slowly while
    messages are under way.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link_bandwidth: float
    overhead: float = 0.0
    reached: float = 0.7
    link_latency: float = 1e-5
    starting: float = 0.0
    posting: float = 0.0
    slowed: float = 0.0

    def delay(self, nbytes: Any) -> Any:
        """Seconds that a message of `nbytes` bytes takes; with a tensor of numbers, one for each."""
        return nbytes / self.link_bandwidth + self.link_latency

    def seconds(self, flops: float, moved: float, dtype: str = "bf16") -> float:
        """Seconds of an op that computes `flops` in `dtype` and moves `moved` bytes: the longer of the two,
        and its start.
        """
        slow = {8: 8.0, 4: 2.0}.get(dtype_bytes(dtype), 1.0)
        computing = flops * slow / (self.flops * self.reached)
        moving = moved / self.bandwidth
        return max(computing, moving) + self.overhead


def _gpu(
    name: str, flops: float, bandwidth: float, memory: float, link: float
) -> Device:
    """A GPU. What the host takes is that of eager mode on 2 H200, torch 2.11, 2026-11-26."""
    return Device(
        name,
        flops,
        bandwidth,
        memory,
        link,
        overhead=3e-6,
        starting=1.5e-5,
        posting=6e-5,
        slowed=0.1,
    )


GiB = 2**30
DEVICES = {
    d.name: d
    for d in (
        _gpu("B200", 2250e12, 8.0e12, 180 * GiB, 900e9),
        _gpu("H200", 989e12, 4.8e12, 139 * GiB, 450e9),
        _gpu("H100", 989e12, 3.35e12, 79 * GiB, 450e9),
        _gpu("A100", 312e12, 2.04e12, 79 * GiB, 300e9),
        _gpu("MI300X", 1307e12, 5.3e12, 191 * GiB, 448e9),
        _gpu("L4", 121e12, 0.3e12, 22 * GiB, 32e9),
        Device("CPU", 0.2e12, 20e9, 16 * GiB, 5e9, 5e-6, 0.5),
    )
}
"""Known devices, with the numbers of their makers' data sheets: dense 16-bit FLOPs, and one way of the link
to a neighbour.
"""


def device(wanted: Device | str) -> Device:
    """The device itself, or the known one of that name. Raises InputError for unknown names."""
    if isinstance(wanted, Device):
        return wanted
    if not isinstance(wanted, str):
        raise InputError(
            f"device={wanted!r} is no device",
            hint='the name of a known one, such as "H100", a Device(...), or a list of these',
        )
    if wanted not in DEVICES:
        raise InputError(
            f"device '{wanted}' is not known",
            hint=f"{nearest(wanted, DEVICES)} a Device(...) describes any other",
        )
    return DEVICES[wanted]


@dataclass(frozen=True)
class OpCost:
    """The cost of one op. flops and moved (bytes read and written) are those of the forward, those with
    `backward_` those of the backward.

    kept: values whose storage the backward reads, neither state nor user inputs; extra: further bytes kept.
    passing: bytes of the gradients that its backward reads and makes. weights: the part of the backward that
    is for parameters. source: where `flops` comes from: 'formula' or 'bytes only'.
    """

    flops: float = 0.0
    moved: float = 0.0
    backward_flops: float = 0.0
    backward_moved: float = 0.0
    kept: tuple[Value, ...] = ()
    extra: int = 0
    passing: int = 0
    dtype: str = "f32"
    source: str = "bytes only"
    weights: float = 0.0

    def on(self, where: Device, training: bool = True) -> float:
        """Seconds on a device, with the backward when training."""
        if not self.moved and not self.flops:
            return 0.0
        total = where.seconds(self.flops, self.moved, self.dtype)
        if training and (self.backward_flops or self.backward_moved):
            total += where.seconds(self.backward_flops, self.backward_moved, self.dtype)
        return total


def op_costs(
    ops: Sequence[Op],
    sizes: Sizes | None = None,
    bindings: Bindings | None = None,
) -> list[OpCost]:
    """The cost of each op. `sizes` gives the symbolic sizes."""
    counter = _Counter(dict(sizes or {}), bindings or Bindings())
    return [counter.cost(op) for op in ops]


def known_shape(kind: TensorType, sizes: Sizes) -> list[int]:
    """The shape of a tensor, with 1 for a size that is not known."""
    symbols = tuple(sorted(sizes.items()))
    return [_known(dim, symbols) for dim in kind.shape]


def _known(dim: Dim, symbols: tuple[tuple[str, int], ...]) -> int:
    if isinstance(dim, int):
        return dim
    return evaluate(dim, symbols) or 1


def known_bytes(kind: Type, sizes: Sizes) -> int:
    """Bytes of a value; 8 for one that is no tensor."""
    if not isinstance(kind, TensorType):
        return 8
    return math.prod(known_shape(kind, sizes)) * dtype_bytes(kind.dtype)


@dataclass(frozen=True)
class _Counted:
    """The counts of one run of an op, for all ops of its signature. kept: the values that its backward reads,
    each as ("operand" or "result", position).
    """

    flops: float
    backward_flops: float
    kept: tuple[tuple[str, int], ...]
    extra: int
    weight_flops: float


@dataclass
class _Counter:
    sizes: dict[str, int]
    bindings: Bindings
    counted: dict[str, _Counted | None] = field(default_factory=dict)

    def cost(self, op: Op) -> OpCost:
        if op.is_split:
            return OpCost()
        again = any(context.kind == "checkpoint" for context in op.context)
        trains = any(carries_grad(result.type) for result in op.definitions())
        moved = self._moved(op)
        # the gradient of a table of rows has all of them
        backward_moved = 1.5 * (moved + self._left_out(op)) if trains else 0.0
        counted = None
        if op.operands and (moved or op.regions):
            key = self._signature(op)
            if key not in self.counted:
                self.counted[key] = self._run(op, trains)
            counted = self.counted[key]
        if counted is None:
            return OpCost(
                moved=moved,
                backward_moved=backward_moved,
                passing=self._passing(op),
                dtype=_dtype(op),
                weights=_weights_share(op, None),
            )
        backward_flops = counted.backward_flops
        kept = _kept_values(op, counted)
        extra = counted.extra
        if again:  # the region keeps what comes into it, and runs twice
            backward_flops += counted.flops
            backward_moved += moved
            kept = _entering(op)
            extra = 0
        return OpCost(
            counted.flops,
            moved,
            backward_flops,
            backward_moved,
            _made_by_ops(kept),
            extra,
            self._passing(op),
            _dtype(op),
            "formula",
            _weights_share(op, counted),
        )

    def _moved(self, op: Op) -> float:
        """Bytes read and written: none for views."""
        if op.is_view:
            return 0.0
        total = float(sum(self.nbytes(v) for v in (*op.operands, *op.results)))
        return total - self._left_out(op)

    def _left_out(self, op: Op) -> float:
        """Bytes of an operand of which only some rows are read, without these rows."""
        if not facts(op).takes_rows:
            return 0.0
        table, indices, *_ = op.operands
        if not isinstance(table.type, TensorType):
            return 0.0
        if not isinstance(indices.type, TensorType):
            return 0.0
        rows = self._shape(table.type)[0]
        taken = math.prod(self._shape(indices.type))
        return self.nbytes(table) * max(0.0, 1 - taken / max(1, rows))

    def _passing(self, op: Op) -> int:
        operands = [
            v for v in dict.fromkeys(op.operands) if not isinstance(v.owner, StateEntry)
        ]
        return sum(
            self.nbytes(v) for v in (*operands, *op.results) if carries_grad(v.type)
        )

    def nbytes(self, value: Value) -> int:
        """Bytes of a value, 0 for a value that is no tensor."""
        if not isinstance(value.type, TensorType):
            return 0
        return known_bytes(value.type, self.sizes)

    def _shape(self, tensor_type: TensorType) -> list[int]:
        return known_shape(tensor_type, self.sizes)

    def _size(self, dim: Dim) -> int:
        """The number that a size stands for, 1 where it is not known."""
        return _known(dim, self._sorted_sizes)

    @cached_property
    def _sorted_sizes(self) -> tuple[tuple[str, int], ...]:
        return tuple(sorted(self.sizes.items()))

    def _strided(self, tensor: torch.Tensor, strides: Sequence[Dim]) -> torch.Tensor:
        """The same number of elements, laid out in the order of dims that these strides have."""
        steps = [self._size(step) for step in strides]
        order = sorted(range(tensor.dim()), key=lambda dim: -steps[dim])
        inverse = sorted(range(tensor.dim()), key=order.__getitem__)
        return tensor.reshape([tensor.shape[dim] for dim in order]).permute(inverse)

    def _signature(self, op: Op) -> str:
        tree = transform(
            (op.args, op.kwargs),
            lambda leaf: leaf.type if isinstance(leaf, Value) else leaf,
        )
        identity = id(op) if op.regions else ""
        return f"{op.target} {tree} {op.context} {identity}"

    def _run(self, op: Op, trains: bool) -> _Counted | None:
        """The op's run on the meta device, None when it cannot run there."""
        try:
            return self._count(op, trains)
        except Exception as error:
            raise_ours(error)
            return None

    def _tensors(self, op: Op, trains: bool) -> dict[Value, Any]:
        """A tensor on meta for each operand, of the same type. One that carries gradient is no leaf, because
        the op may write it.
        """
        env: dict[Value, Any] = {}
        for value in op.operands:
            value_type = value.type
            if not isinstance(value_type, TensorType):
                env[value] = self._size(str(getattr(value_type, "expr", "1")))
                continue
            dtype: torch.dtype = getattr(torch, DTYPES[value_type.dtype])
            shape = self._shape(value_type)
            tensor = torch.empty(shape, dtype=dtype, device="meta")
            if value_type.strides is not None:
                tensor = self._strided(tensor, value_type.strides)
            if trains and value_type.grad:
                tensor = tensor.requires_grad_().clone()
            env[value] = tensor
        return env

    def _count(self, op: Op, trains: bool) -> _Counted:
        env = self._tensors(op, trains)
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with (
            torch.set_grad_enabled(trains),
            hooks,
            FlopCounterMode(display=False) as counter,
        ):
            result = _apply(op, env, self.bindings)
            forward = counter.get_total_flops()
            for_inputs = 0
            if trains:
                _backward(result, _of_state(env, False), keep_graph=True)
                for_inputs = counter.get_total_flops() - forward
                _backward(result, _of_state(env, True))
            backward = counter.get_total_flops() - forward
        if facts(op).grouped_product and not forward:
            rows = env[op.operands[0]]
            matrices = env[op.operands[1]]
            forward = for_inputs = 2 * rows.numel() * matrices.shape[-1]
            backward = forward * 2
        results = [
            leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)
        ]
        kept_at, extra = _kept_by_kernel(op, results)
        if kept_at is None:
            kept_at, extra = _kept_by_autograd(op, env, results, kept)
        return _Counted(forward, backward, kept_at, extra, backward - for_inputs)


_Places = tuple[tuple[str, int], ...]


def _kept_by_kernel(
    op: Op, results: Sequence[torch.Tensor]
) -> tuple[_Places | None, int]:
    """As `_kept_by_autograd`, for ops that are decomposed on meta and are one kernel elsewhere; None for
    others.
    """
    known = facts(op)
    if not (known.attention or known.norm_of_rows):
        return None, 0
    rows = results[0].numel() // max(1, results[0].shape[-1]) * 4
    if known.norm_of_rows:  # its operand and a number for each row
        return (("operand", 0),), rows
    carrying = [
        ("operand", i) for i, v in enumerate(op.operands) if carries_grad(v.type)
    ]
    return (*carrying, ("result", 0)), rows  # and a row of sums


def _kept_by_autograd(
    op: Op,
    env: Mapping[Value, Any],
    results: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
) -> tuple[_Places, int]:
    """The operands and results that autograd keeps, and the bytes of what it keeps besides."""
    homes: dict[int | None, tuple[str, int]] = {}
    for position, tensor in enumerate(results[: len(op.results)]):
        homes[storage_of(tensor)] = ("result", position)
    for position, value in enumerate(op.operands):
        if isinstance(env[value], torch.Tensor):
            homes[storage_of(env[value])] = ("operand", position)
    places: dict[tuple[str, int], None] = {}
    extra: dict[int | None, int] = {}
    for tensor in kept:
        storage = storage_of(tensor)
        if storage in homes:
            places[homes[storage]] = None
        else:
            extra[storage] = tensor.untyped_storage().nbytes()
    return tuple(places), sum(extra.values())


def _of_state(env: Mapping[Value, Any], state: bool) -> list[Any]:
    """The operands that are state, or those that are not."""
    return [
        tensor
        for value, tensor in env.items()
        if isinstance(value.owner, StateEntry) == state
    ]


def _weights_share(op: Op, counted: _Counted | None) -> float:
    """The part of an op's backward that is for parameters: by FLOPs where it has any, else all or nothing."""
    state = False
    others = False
    for value in op.operands:
        if carries_grad(value.type):
            is_state = isinstance(value.owner, StateEntry)
            state |= is_state
            others |= not is_state
    if not state:
        return 0.0
    if counted is not None and counted.backward_flops and others:
        return counted.weight_flops / counted.backward_flops
    return 0.0 if others else 1.0


def _kept_values(op: Op, counted: _Counted) -> list[Value]:
    """The operands and results that the backward of an op reads."""
    kept: list[Value] = []
    for role, position in counted.kept:
        values = op.operands if role == "operand" else op.results
        kept.append(values[position])
    return kept


def _entering(op: Op) -> list[Value]:
    """The operands of an op that come into its region from outside."""
    entering: list[Value] = []
    for value in op.operands:
        owner = value.owner
        if not isinstance(owner, Op) or owner.context != op.context:
            entering.append(value)
    return entering


def _made_by_ops(values: Iterable[Value]) -> tuple[Value, ...]:
    """The storage of these values, each once, without that of state and of user inputs."""
    roots = dict.fromkeys(map(storage_root, values))
    return tuple(root for root in roots if isinstance(root.owner, Op))


def _apply(op: Op, env: dict[Value, Any], bindings: Bindings) -> Any:
    machine = Machine(bindings)
    with ExitStack() as stack:
        for context in op.context:
            if context.kind == "autocast":
                stack.enter_context(enter(context))
        return machine.apply(op, env)


def _backward(result: Any, operands: Sequence[Any], keep_graph: bool = False) -> None:
    """The gradients of these operands."""
    outputs = [
        leaf
        for leaf in tree_leaves(result)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    inputs = [t for t in operands if isinstance(t, torch.Tensor) and t.requires_grad]
    if outputs and inputs:
        torch.autograd.grad(
            outputs,
            inputs,
            [torch.ones_like(o) for o in outputs],
            retain_graph=keep_graph,
            allow_unused=True,
        )


def _dtype(op: Op) -> str:
    """The dtype in which an op computes: that of an autocast around it, else the widest float of its
    operands.
    """
    for context in reversed(op.context):
        if context.kind == "autocast" and len(context.args) > 2 and context.args[2]:
            text = getattr(context.args[1], "text", "")
            return "bf16" if "16" in text else "f32"
    dtypes = [
        v.type.dtype
        for v in (*op.operands, *op.results)
        if isinstance(v.type, TensorType) and v.type.differentiable
    ]
    return max(dtypes, key=dtype_bytes, default="f32")


def state_bytes(entries: Iterable[StateEntry]) -> tuple[int, int]:
    """Bytes of these tensors, and bytes of the trained ones among them."""
    sizes = [
        (e, e.type.nbytes() or 0) for e in entries if isinstance(e.type, TensorType)
    ]
    return sum(size for _, size in sizes), sum(
        size for e, size in sizes if e.kind == "param" and e.requires_grad
    )


def program_ops(program: Program) -> list[Op]:
    """The ops of a program at any phase, split markers left out."""
    return [op for op in program.all_ops() if not op.is_split]
