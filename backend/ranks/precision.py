"""The dtypes in which the stages compute, where they are not those of the trace.

Autocast around a step, stages that were cast after the cut, and FSDP's mixed precision change dtypes behind
the trace, and with them what crosses. No rank can tell by itself what another hands on. So all ranks agree
once on whether anything changes. If so, they rehearse: one micro-batch goes through all stages, forward only,
and each rank tells the dtypes that came out.

A trace keeps dtypes that the model's code named, and does not keep whether it said `float32` or `x.dtype`. A
program with such a dtype is refused where that makes a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from stagecut.backend.ranks.faults import Faults
from stagecut.backend.ranks.stage import BuiltStage, Group
from stagecut.backend.ranks.wire import boundaries, fed_inputs
from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import entries, held_tensors
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Program, Token, Value
from stagecut.ir.types import DTYPES, TensorType

Dtypes = Mapping[Value, torch.dtype]
"""The dtypes of values that cross. Empty: they are those of the program."""

_CAST = "cast the model before it is cut"
_AROUND = "put torch.autocast around pipeline() as well as around the step"
_SHARDED = f"leave param_dtype and output_dtype out, and {_AROUND}"


class PrecisionError(StagecutError):
    """The stages cannot be right in the precision in which they would run."""

    __module__ = "stagecut"


@dataclass(frozen=True)
class Change:
    """A difference between how the model was traced and how it runs, and what to do about it."""

    what: str
    hint: str


@dataclass(frozen=True)
class RankDtypes:
    """The dtypes that decide all others on a rank: that of autocast, and those of the state of its stages."""

    autocast: torch.dtype | None
    state: tuple[torch.dtype, ...]


@dataclass(eq=False)
class Agreed:
    """The facts that all ranks know: a change from how the model was traced, None for no change, and the
    dtypes of what crosses then, None until they were found.
    """

    change: Change | None = None
    dtypes: Dtypes | None = None


class Precision:
    """The dtypes of a pipe's steps, the same on all ranks. `agreed` is what was last agreed on."""

    def __init__(
        self,
        pipe: Staged,
        homes: Sequence[int],
        group: Group,
        device: torch.device,
        faults: Faults,
    ) -> None:
        self.agreed = Agreed()
        self._pipe = pipe
        self._homes = tuple(homes)
        self._group = group
        self._device = device
        self._faults = faults
        self._own_stages = [i for i, home in enumerate(homes) if home == faults.rank]
        self._last: RankDtypes | None = None
        self._agreements: dict[tuple[RankDtypes, ...], Agreed] = {}

    def changed_here(self) -> bool:
        """True when this rank must agree with the others anew."""
        return self._rank_dtypes() != self._last

    def agree(self, modules: Mapping[int, nn.Module]) -> None:
        """All ranks know in which precision each of them runs. Every rank calls it, where one has changed.

        Raises PrecisionError on all ranks when they differ, or when the program cannot follow.
        """
        own = self._rank_dtypes()
        everywhere: list[Any] = [None] * self._faults.ranks
        with self._faults.together(agreed=(StagecutError,)):
            message = own, self._change(own.autocast, modules)
            dist.all_gather_object(everywhere, message, self._group)
            _refuse_two_autocasts([dtypes.autocast for dtypes, _ in everywhere])
            changes = [change for _, change in everywhere if change is not None]
            if changes:
                _refuse_named_dtypes(self._pipe, self._device, changes[0])
        key = tuple(dtypes for dtypes, _ in everywhere)
        agreed = Agreed(changes[0]) if changes else Agreed()
        self.agreed = self._agreements.setdefault(key, agreed)
        self._last = own

    def dtypes(self, make: Callable[[int, Dtypes], BuiltStage]) -> Dtypes:
        """The dtypes of what crosses, found in a rehearsal the first time. Every rank calls it.

        `make` gives a stage of this rank for torch's schedules, with these dtypes at its boundaries.
        """
        agreed = self.agreed
        if agreed.change is None:
            return {}
        if agreed.dtypes is None:
            with self._faults.together():
                agreed.dtypes = self._rehearse(make, agreed.change)
        return agreed.dtypes

    def _rank_dtypes(self) -> RankDtypes:
        return RankDtypes(self._autocast(), self._state())

    def _autocast(self) -> torch.dtype | None:
        device_type = self._device.type
        if not torch.is_autocast_enabled(device_type):
            return None
        return torch.get_autocast_dtype(device_type)

    def _state(self) -> tuple[torch.dtype, ...]:
        stages = [self._pipe.stages[index] for index in self._own_stages]
        return tuple(
            tensor.dtype
            for stage in stages
            for tensor in (*stage.parameters(), *stage.buffers())
        )

    def _change(
        self, autocast: torch.dtype | None, modules: Mapping[int, nn.Module]
    ) -> Change | None:
        """The first difference on this rank."""
        traced = self._pipe.traced_under.get(self._device.type)
        if autocast != traced:
            return Change(
                f"the model was traced {_under(traced)}, and a step runs {_under(autocast)}",
                _AROUND,
            )
        return self._cast() or _sharded(modules)

    def _cast(self) -> Change | None:
        program = self._pipe.program
        stages = [self._pipe.stages[index] for index in self._own_stages]
        for entry in entries(program, self._own_stages):
            want = _dtype(entry.type)
            for tensor in held_tensors(program, stages, entry):
                if want is not None and tensor.dtype != want:
                    return Change(
                        f"'{entry.name}' is {tensor.dtype}, and was traced as {want}",
                        _CAST,
                    )
        return None

    def _rehearse(
        self, make: Callable[[int, Dtypes], BuiltStage], change: Change
    ) -> Dtypes:
        """The dtypes of what every stage hands on, found by a run of one micro-batch."""
        program = self._pipe.program
        lists = boundaries(program, fed_inputs(program))
        dtypes: dict[Value, torch.dtype] = {}
        packed: list[torch.Tensor] = []
        for index, home in enumerate(self._homes):
            message: list[Any] = [None]
            values: dict[Value, Any] = {}
            if home == self._faults.rank:
                stage = make(index, dtypes)
                if index and self._homes[index - 1] != home:
                    packed = self._received(stage, self._homes[index - 1])
                values = _rehearsed(stage, packed, change)
                message = [[getattr(values[v], "dtype", None) for v in lists[index]]]
            dist.broadcast_object_list(message, group=self._group, group_src=home)
            pairs = zip(lists[index], message[0], strict=True)
            dtypes |= {value: dtype for value, dtype in pairs if dtype is not None}
            if values and index + 1 < len(self._homes):
                packed = make(index, dtypes).packed(values)
                self._send(packed, self._homes[index + 1])
        return dtypes

    def _received(self, stage: BuiltStage, source: int) -> list[torch.Tensor]:
        packed = [
            torch.empty(p.wire_shape, dtype=p.wire_dtype, device=self._device)
            for p in stage.received
        ]
        for tensor in packed:
            dist.recv(tensor, group=self._group, group_src=source)
        return packed

    def _send(self, packed: Sequence[torch.Tensor], target: int) -> None:
        if target == self._faults.rank:
            return
        for tensor in packed:
            dist.send(tensor, group=self._group, group_dst=target)


def _rehearsed(
    stage: BuiltStage, packed: Sequence[torch.Tensor], change: Change
) -> dict[Value, Any]:
    """The values of one micro-batch in a stage, which is as it was before."""
    try:
        with undisturbed(stage.submod, stage.device), torch.no_grad():
            return stage.values(packed if stage.stage_index else (), stage.fed_with(0))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise PrecisionError(
            f"stage {stage.stage_index} does not run in other dtypes than it was traced in: "
            f"{change.what}: {str(error).splitlines()[0]}",
            hint=change.hint,
        ) from None


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A run inside leaves no trace: buffers, random numbers, autocast's copies of weights, and what FSDP
    holds are afterwards as they were.
    """
    buffers = [
        (owner, name, tensor, tensor.clone())
        for owner in module.modules()
        for name, tensor in owner._buffers.items()
        if tensor is not None
    ]
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)
        for owner, name, tensor, contents in buffers:
            owner._buffers[name] = tensor
            tensor.copy_(contents)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def _sharded(modules: Mapping[int, nn.Module]) -> Change | None:
    """A stage that FSDP computes in another dtype than it holds."""
    for index, module in modules.items():
        for part in module.modules():
            if not isinstance(part, FSDPModule):
                continue
            policy = part._get_fsdp_state()._mp_policy
            for option in ("param_dtype", "output_dtype"):
                dtype = getattr(policy, option)
                if dtype is not None:
                    return Change(
                        f"stage {index} is sharded with {option}={dtype}", _SHARDED
                    )
    return None


def _refuse_two_autocasts(everywhere: Sequence[torch.dtype | None]) -> None:
    for rank, autocast in enumerate(everywhere):
        if autocast != everywhere[0]:
            raise PrecisionError(
                f"rank 0 steps {_under(everywhere[0])}, and rank {rank} {_under(autocast)}",
                hint="put the same torch.autocast around the step on every rank",
            )


def _refuse_named_dtypes(pipe: Staged, device: torch.device, change: Change) -> None:
    """Returns when no op of the program names a dtype that may have been meant as that of a tensor."""
    program = pipe.program
    meant = _traced_in(program)
    if device.type in pipe.traced_under:
        meant.add(str(pipe.traced_under[device.type]))
    for op in program.all_ops():
        named = [text for text in _tokens((op.args, op.kwargs)) if text in meant]
        if named:
            raise PrecisionError(
                f"{change.what}, but a stage keeps {named[0]} where the model may mean the dtype of a tensor",
                where=op.where(),
                hint=change.hint,
            )


def _traced_in(program: Program) -> set[str]:
    """The dtypes of the floating state of a program, as torch writes them."""
    traced: set[str] = set()
    for entry in program.state:
        dtype = _dtype(entry.type)
        if dtype is not None and dtype.is_floating_point:
            traced.add(str(dtype))
    return traced


def _dtype(value_type: object) -> torch.dtype | None:
    if not isinstance(value_type, TensorType):
        return None
    dtype: torch.dtype = getattr(torch, DTYPES[value_type.dtype])
    return dtype


def _tokens(tree: Any) -> Iterator[str]:
    """The text of every literal of torch's in operands."""
    if isinstance(tree, Token):
        yield tree.text
    elif isinstance(tree, Mapping):
        yield from _tokens(list(tree.values()))
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from _tokens(part)


def _under(autocast: torch.dtype | None) -> str:
    if autocast is None:
        return "without autocast"
    return f"under autocast to {autocast}"
