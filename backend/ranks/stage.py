"""Stages of a pipe as torch's schedules know them: `build_stage` gives a PipelineStage of torch's.

Neighbours exchange flat tuples of contiguous tensors (`backend.wire`), so every schedule that torch has runs
every model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, _utils
from torch.nn.parallel import DistributedDataParallel

from stagecut.backend.ranks.buffers import Buffers
from stagecut.backend.ranks.draws import Draws
from stagecut.backend.ranks.posts import Posts
from stagecut.backend.ranks.wire import (
    Port,
    Sizes,
    boundaries,
    fed_inputs,
    own,
    port,
    writable,
    writes_explained,
)
from stagecut.backend.schedules import BACKWARD, FORWARD
from stagecut.backend.stages.crossing import (
    backward_is_whole,
    lives_in_buffer,
    refuse_feedback,
    refuse_shared,
    written_arguments,
    written_inputs,
)
from stagecut.backend.stages.fx_view import refuse_torchs_stage, split_graph
from stagecut.backend.stages.graphs import Graphs
from stagecut.backend.stages.modules import StageModule
from stagecut.backend.stages.run import results_of
from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import refuse_meta
from stagecut.ir.errors import InputError, StagecutError
from stagecut.ir.graph import Op, Value
from stagecut.ir.keywords import near_names
from stagecut.ir.run.storage import storage_of

_METADATA = "PipeliningMetadataError"
_SHAPE = "PipeliningShapeError"
_MISMATCH = _METADATA if hasattr(_utils, _METADATA) else _SHAPE
_TorchMismatch: Any = getattr(_utils, _MISMATCH)

Group = dist.ProcessGroup | None
_STATIC_GRADS = not hasattr(PipelineStage, "_setup_forward_recv_info")
"""True for the torch whose schedules treat every value at a boundary as one with a gradient."""


_Runner = Callable[[], Callable[[], None]]
"""Gives the part of a backward that computes the gradients of weights."""

_Ports = tuple[list[Port], list[Port]]
"""The ports of what a stage receives, and of what it hands on."""


class MismatchError(InputError, _TorchMismatch):  # type: ignore[misc]
    """A tensor at a boundary does not have the shape or the dtype that the program says."""

    __module__ = "stagecut"


_scaled: WeakKeyDictionary[Staged, set[int]] = WeakKeyDictionary()
"""Pipe -> its stages whose gradients have been scaled in this step."""


def _refuse_changes(pipe: Staged) -> None:
    """Raises StagecutError where forward changes objects that it is given, or returns them: a schedule of
    torch's knows inputs and outputs.
    """
    spec = pipe._call_spec
    if spec is None or not spec.needs_arguments:
        return
    if not spec.changes:
        raise StagecutError(
            "forward returns an object that it is given, and a schedule has other ones for each micro-batch",
            hint="return tensors, in new tuples, lists and dicts; or run the stages in one process",
        )
    left = pipe.program.output_names[spec.result_leaves :]
    raise StagecutError(
        "forward changes what it is given, and no schedule would put that back",
        where=", ".join([*left[:3], *["..."] * (len(left) > 3)]),
        hint="return new tuples, lists and dicts; or run the stages in one process",
    )


class BuiltStage(PipelineStage):
    """A stage of a pipe as torch's schedules know it. `Pipe.build_stage` and `stagecut.build_stage` make one.

    pipe, index: the pipe, and which of its stages this is. `submod` is its module, under the model's names.
    device, group: where it runs, and the ranks that run the stages.
    sizes: name of a dynamic size -> its value in the micro-batches.
    fed: whether every stage takes the model's inputs that it reads from `microbatches`, one list of flat
        inputs for each micro-batch. Otherwise the first stage takes the model's own arguments and hands them
        on.
    dtypes: value -> the dtype in which it crosses, where that is not the program's.
    draws: the model's own stream of random numbers, or None.
    """

    def __init__(
        self,
        pipe: Staged,
        index: int,
        device: torch.device,
        group: Group,
        sizes: Sizes,
        fed: bool,
        dtypes: Mapping[Value, torch.dtype],
        draws: Draws | None = None,
    ) -> None:
        program = pipe.program
        refuse_feedback(program, pipe.training)
        lists = boundaries(program, fed_inputs(program) if fed else frozenset())
        self._received = lists[index - 1] if index else []
        self._sent_on = lists[index]
        _scaled.setdefault(pipe, set())
        self.pipe = pipe
        self.fed = fed
        self.block = program.stages[index]
        self.microbatches: list[list[Any]] = []
        self.results: dict[int, tuple[torch.Tensor, ...]] | None = {}
        self.draws = draws
        self._dtypes = dtypes
        self.buffers: Buffers | None = None
        self._state = draws.port if draws is not None else None
        self._microbatch = 0
        self.whole = False
        self.awaits_values = False
        """True until a stage that was on meta has run."""
        self.graphs: Graphs | None = None
        self._is_warm = False
        self._graph_chunks: set[int] = set()
        """The micro-batches of this step whose forward was run by graphs."""
        self._ports: list[_Ports] = []
        self.received, self.sent = self._first = self._ports_for(sizes)
        self._written = written_inputs(self.block)
        sent_on = {p.value for p in self.sent if p.grad}
        self._handed_on = tuple(
            place
            for place, value in enumerate(self.block.inputs)
            if value in sent_on and value not in self._written
        )
        self._in_buffers = {p.value for p in self.sent if lives_in_buffer(p.value)}
        self._fed_inputs: list[tuple[int, Value]] = []
        for number, value in enumerate(program.inputs):
            if value in self._received:
                continue
            if value in self.block.inputs or index == 0:
                self._fed_inputs.append((number, value))
        received_metas = tuple(p.meta() for p in self.received)
        sent_metas = tuple(p.meta() for p in self.sent)
        arriving = {p.value for p in self.received if p.grad}
        leaving = {p.value for p in self.sent if p.grad}
        # without gradients for its inputs, torch up to 2.12 finds nothing to split
        whole = not arriving or backward_is_whole(self.block, arriving, leaving)
        runner: _Runner | None = (lambda: _nothing) if index > 0 and whole else None
        self._by_autograd = runner
        super().__init__(
            pipe.stages[index],
            index,
            len(program.stages),
            device,
            received_metas,
            sent_metas,
            group=group,
            dw_builder=runner,
        )

    def _ports_for(self, sizes: Sizes) -> _Ports:
        """The ports of what is received and of what is handed on, in a micro-batch of these sizes."""
        last = self.block is self.pipe.program.stages[-1]
        dtypes = self._dtypes
        received = [port(v, sizes, dtypes.get(v)) for v in self._received]
        sent = [port(v, sizes, dtypes.get(v), returned=last) for v in self._sent_on]
        if self._state is not None:
            received += [self._state] * (self.block.index > 0)
            sent += [self._state] * (not last)
        return received, sent

    def resize(self, sizes: Sequence[Sizes]) -> None:
        """The micro-batches of the next step have these sizes, one for each."""
        ports: dict[tuple[tuple[str, int], ...], _Ports] = {}
        self._ports = []
        for chunk_sizes in sizes:
            key = tuple(sorted(chunk_sizes.items()))
            if key not in ports:
                ports[key] = self._ports_for(chunk_sizes)
            self._ports.append(ports[key])

    def _turn_to(self, chunk: int) -> None:
        """The ports are those of this micro-batch."""
        if self._ports:
            self.received, self.sent = self._ports[chunk]

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        """As torch's, into buffers of the sizes of this micro-batch."""
        self._turn_to(fwd_chunk_id)
        _fit(self.args_recv_info[fwd_chunk_id], self.received, self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        """As torch's, into buffers of the sizes of this micro-batch."""
        self._turn_to(bwd_chunk_id)
        if self.has_backward and not self.is_last:
            _fit(self.grad_recv_info[bwd_chunk_id], self.sent, self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: Any,
        kwargs: Any = None,
        save_forward_output: bool = True,
    ) -> Any:
        """As torch's. With `fed`, the stage's own inputs of this micro-batch are passed as keywords."""
        self._microbatch = fwd_chunk_id
        self._turn_to(fwd_chunk_id)
        if self.fed:
            args = ()
            kwargs = self.fed_with(fwd_chunk_id)
        try:
            output = super().forward_one_chunk(
                fwd_chunk_id, args, kwargs, save_forward_output
            )
        except RuntimeError as error:
            if isinstance(error.__cause__, StagecutError):
                raise error.__cause__ from None
            raise
        if self.is_last and self.results is not None and self.fed:
            self.results[fwd_chunk_id] = tuple(t.detach() for t in as_tuple(output))
        return output

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Unpacks the values that crossed, runs the stage, and packs the values it hands on."""
        values = self.values(args, kwargs)
        for p in self.sent:
            self._check(p, values[p.value])
        if self.is_last:
            return self._returned(
                values, {storage_of(t) for t in args if isinstance(t, torch.Tensor)}
            )
        return tuple(
            self._kept_apart(p, tensor, set())
            for p, tensor in zip(self.sent, self.packed(values), strict=True)
        )

    def packed(self, values: Mapping[Value, Any]) -> list[torch.Tensor]:
        """The tensors that cross to the next stage, from the `values` that the stage knows."""
        return [p.pack(values[p.value], self.device) for p in self.sent]

    def fed_with(self, microbatch: int) -> dict[str, Any]:
        """The inputs that the stage takes itself in `microbatch`, a number from 0 on, as keywords."""
        return {
            f"input_{i}": self.microbatches[microbatch][i] for i, _ in self._fed_inputs
        }

    def values(self, args: Any, kwargs: Any) -> dict[Value, Any]:
        """The values that the stage knows when it has run on what crossed, `args`, and on what it is fed
        with, `kwargs`. Raises StagecutError where it is on meta and the device is not.
        """
        if self.awaits_values and self.device.type != "meta":
            refuse_meta(self.pipe.program, self.pipe.stages[self.stage_index])
            self.awaits_values = False
        values: dict[Value, Any] = {}
        if self.fed:
            values = {v: kwargs[f"input_{i}"] for i, v in self._fed_inputs}
        elif self.is_first:
            values = dict(
                zip(
                    self.pipe.program.inputs,
                    self._flat_inputs(args, kwargs),
                    strict=True,
                )
            )
        values |= {
            p.value: p.unpack(t)
            for p, t in zip(self.received, () if self.is_first else args, strict=True)
        }
        inputs = self._inputs(values)
        with writes_explained(self.stage_index), self._apart(values):
            computed = self._by_graphs(inputs)
            if computed is None:
                returned = super().forward_maybe_with_nosync(*inputs)
                results = results_of(returned, self.block)
                computed = dict(zip(self.block.outputs, results, strict=True))
        values |= computed
        return values

    def _inputs(self, values: Mapping[Value, Any]) -> list[Any]:
        """The inputs of the stage. What it writes, it may write."""
        strides = {p.value: p.strides for p in self.received}
        return [
            writable(values[v], strides.get(v)) if v in self._written else values[v]
            for v in self.block.inputs
        ]

    def warm_up(self) -> None:
        """The functions of graphs are compiled for the first micro-batch. All ranks do so at once: in a
        schedule each would wait for the one before it.
        """
        if self.graphs is None or self._is_warm or self.awaits_values:
            return
        self._is_warm = True
        self._turn_to(0)
        values = {v: self.microbatches[0][i] for i, v in self._fed_inputs}
        values |= {p.value: p.stand_in(self.device) for p in self.received}
        self.graphs.warm_up(self._inputs(values), self._handed_on)

    def _by_graphs(self, inputs: list[Any]) -> dict[Value, Any] | None:
        """The outputs of the stage, and the inputs that it hands on, as graphs give them. None where they do
        not run it.
        """
        if self.graphs is None:
            return None
        results = self.graphs.run(inputs, self._handed_on)
        self._graph_chunks.discard(self._microbatch)
        if results is None:
            return None
        self._graph_chunks.add(self._microbatch)
        handed_on = [self.block.inputs[place] for place in self._handed_on]
        return dict(
            zip(
                [*self.block.outputs, *handed_on],
                results,
                strict=True,
            )
        )

    @contextmanager
    def _apart(self, values: dict[Value, Any]) -> Iterator[None]:
        """Inside, the stage draws the random numbers of its micro-batch, and in eval mode it has the buffers
        of its micro-batch.
        """
        if self.draws is None or self.buffers is None:
            yield
            return
        state = self._state
        received = values.get(state.value) if state is not None else None
        with (
            self.buffers.of(self._microbatch),
            self.draws.stream(self.stage_index, self._microbatch, received),
        ):
            yield
            if state is not None:
                values[state.value] = self.draws.state().to(self.device)

    def _returned(self, values: Mapping[Value, Any], buffers: set[int | None]) -> Any:
        """The outputs of the model as they lie in memory, because nobody receives them."""
        tensors = [own(p, values[p.value], self.device) for p in self.sent]
        outputs = tuple(
            self._kept_apart(p, tensor, buffers)
            for p, tensor in zip(self.sent, tensors, strict=True)
        )
        if len(outputs) == 1:
            return outputs[0]
        return outputs

    def _kept_apart(
        self, p: Port, tensor: torch.Tensor, buffers: set[int | None]
    ) -> torch.Tensor:
        """A copy of a tensor that is written again before it is read: a buffer of the model, or one of
        `buffers`, into which torch receives. Other tensors are returned as they are.
        """
        if p.value in self._in_buffers or storage_of(tensor) in buffers:
            return tensor.clone()
        return tensor

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> Any:
        """As torch's, but the backward of a wrapped or compiled stage is never split, because torch cannot
        take it apart, nor one with `whole`: its loss reads weights. Where graphs run the stage, its backward
        leaves the gradients of the weights to a function of theirs. Autocast around a step counts for forward
        and loss: each op of a backward has the dtype of its forward already.
        """
        by_graphs = bwd_chunk_id in self._graph_chunks
        if self.graphs is not None:
            # a backward of torch's that no step asked for may have left some
            self.graphs.take_weights()
        if (
            not by_graphs
            and not full_backward
            and self.stage_index
            and (self.whole or self._by_autograd or not _is_plain(self.submod))
        ):
            self._by_autograd = lambda: _nothing
            last_backward = bwd_chunk_id + 1 == self.chunks
        averages = by_graphs and full_backward and last_backward
        self._choose_builder(bwd_chunk_id, averages)
        with _without_autocast(self.device):
            return super().backward_one_chunk(
                bwd_chunk_id, loss, full_backward, last_backward and not by_graphs
            )

    def _choose_builder(self, chunk: int, averages: bool = False) -> None:
        """torch takes the weight part of the backward of this micro-batch from where its forward ran. The
        last of a step `averages` over the replicas of DDP.
        """
        self.dw_builder = self._by_autograd
        if chunk in self._graph_chunks:
            self.dw_builder = self._averaged_weights if averages else self._weights

    def _weights(self) -> Callable[[], None]:
        """The function that adds the gradients of the weights of the backward that ran last."""
        assert self.graphs is not None
        return self.graphs.take_weights()

    def _averaged_weights(self) -> Callable[[], None]:
        """As `_weights`; the replicas of a stage in DDP then have the mean of all that was added."""
        add = self._weights()

        def add_and_average() -> None:
            with self._averaging():
                add()

        return add_and_average

    @contextmanager
    def _averaging(self) -> Iterator[None]:
        """The gradients that are added inside are the last of the step: where DDP is around the stage, it
        takes the mean of what has been added.
        """
        module = self.submod
        if not isinstance(module, DistributedDataParallel):
            yield
            return
        # what its forward does, which graphs do not call
        module.reducer._rebuild_buckets()
        module.reducer.prepare_for_backward([])
        yield
        try:
            module.reducer._check_reducer_finalized()
        except RuntimeError:
            raise StagecutError(
                "the last micro-batch has no gradient for some weights, and DistributedDataParallel waits "
                "for one of each",
                where=f"weights of stage {self.stage_index}",
                hint="freeze them before wrap is called; or find_unused_parameters=True, with autograd",
            ) from None

    def backward_weight_one_chunk(
        self, bwd_chunk_id: int, last_backward: bool = False
    ) -> None:
        """As torch's, without autocast."""
        self._choose_builder(bwd_chunk_id)
        by_graphs = bwd_chunk_id in self._graph_chunks
        averaging = self._averaging() if by_graphs and last_backward else nullcontext()
        with _without_autocast(self.device), averaging:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """As torch's, but nothing in an eval, in which V schedules hand gradients on all the same."""
        if self.has_backward:
            return super().get_local_bwd_output(mb_index)
        return ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """As torch's, but nothing in an eval."""
        if self.has_backward:
            self._turn_to(mb_index)
            _fit(self.grad_recv_info[mb_index], self.sent, self.device)
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        """As torch's, with zeros of the sizes of this micro-batch where no gradient comes back."""
        self._turn_to(bwd_chunk_id)
        if self.has_backward and not self.is_first:
            grads = zip(self.received, self.bwd_cache[bwd_chunk_id], strict=True)
            self.bwd_cache[bwd_chunk_id] = tuple(
                self._grad_or_zeros(p, grad) if p.grad else grad for p, grad in grads
            )
        return super().get_bwd_send_ops(bwd_chunk_id)

    def begin_alone(self) -> None:
        """Each message is begun by itself from now on, and goes over a stream of its pair of ranks."""

    def settle(self) -> None:
        """The tensors that have left may be written by what computes from now on."""

    def clear_runtime_states(self) -> None:
        """As torch's, which calls it when a step begins."""
        super().clear_runtime_states()
        _scaled[self.pipe].discard(self.stage_index)

    def scale_grads(self, grad_scale_factor: int) -> None:
        """As torch's, but a parameter that several stages of this rank share is scaled once a step, by the
        last of them.

        torch scales each stage after the stage's own backwards, when other stages may still add to the
        gradient of a parameter.
        """
        _scaled[self.pipe].add(self.stage_index)
        unscaled: set[torch.nn.Parameter] = set()
        for stage, rank in self.stage_index_to_group_rank.items():
            if rank == self.group_rank and stage not in _scaled[self.pipe]:
                unscaled.update(self.pipe.stages[stage].parameters())
        for parameter in self.submod.parameters():
            if parameter.grad is not None and parameter not in unscaled:
                parameter.grad.div_(grad_scale_factor)

    def _grad_or_zeros(self, p: Port, grad: torch.Tensor | None) -> torch.Tensor:
        """The gradient of what crossed at a port, zeros for none."""
        if grad is not None:
            return grad
        return torch.zeros(p.wire_shape, dtype=p.wire_dtype, device=self.device)

    @cached_property
    def _written_arguments(self) -> tuple[int, ...]:
        return written_arguments(self.pipe.program)

    def _flat_inputs(self, args: Any, kwargs: Any) -> list[Any]:
        try:
            flat = self.pipe.flatten(args, kwargs)
        except InputError as error:
            raise MismatchError(
                error.what, where=error.where, hint=error.hint
            ) from error
        refuse_shared(self.pipe.program, self._written_arguments, flat)
        return flat

    def _check(self, p: Port, actual: Any) -> None:
        if p.shape is None or (p.fits(actual) and actual.dtype == p.dtype):
            return
        what = "dtype" if actual.dtype != p.dtype else "shape"
        raise MismatchError(
            f"stage {self.stage_index}: {what} mismatch: {p.value!r} is {actual.dtype}{list(actual.shape)}, "
            f"expected {p.dtype}{list(p.shape)}",
            where=p.value.owner.where() if isinstance(p.value.owner, Op) else "",
            hint="a hook or a wrapper of the stage changes what it returns",
        )

    def _validate_fwd_input(self, args: Any, kwargs: Any) -> None:
        """Does nothing: the pipe checks the arguments of the model."""

    def _validate_fwd_outputs(self, outputs: Any) -> None:
        """Does nothing: `_check` has done it. torch 2.11 compares strides too, and a compiler may pad
        rows.
        """

    def _validate_stage_tensors(self, desc: str, expected: Any, actual: Any) -> None:
        """As torch's, which TORCH_DISTRIBUTED_DEBUG=DETAIL turns on.

        The first stage receives nothing: its arguments are the model's, and the pipe checks them. Where no
        gradient comes back, torch sends zeros, so that None is right for any gradient. What torch expects has
        the sizes of the first step.
        """
        if self.is_first and expected is self._stage_meta.inputs:
            return
        if (self.received, self.sent) != self._first:
            return
        wanted: list[Any] = []
        present: list[Any] = []
        for want, tensor in zip(expected, actual, strict=True):
            if tensor is not None:
                wanted.append(want)
                present.append(tensor)
        super()._validate_stage_tensors(desc, tuple(wanted), tuple(present))


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _fit(infos: Sequence[Any], ports: Sequence[Port], device: torch.device) -> None:
    """Every buffer has the size that crosses at its port."""
    for info, p in zip(infos, ports, strict=False):
        buffer = getattr(info, "buffer", None)
        if buffer is not None and buffer.shape != p.wire_shape:
            info.buffer = torch.empty(p.wire_shape, dtype=p.wire_dtype, device=device)


def _nothing() -> None:
    """The weight part of a backward that was run as a whole."""


def _is_plain(module: torch.nn.Module) -> bool:
    """True for a stage as it was made: nothing in it is wrapped, sharded or compiled."""
    return all(
        isinstance(part, StageModule)
        and not isinstance(part, FSDPModule)
        and part._compiled_call_impl is None
        for part in module.modules()
    )


class _EarlierStage(BuiltStage):
    """For torch up to 2.12. Its backward for the inputs treats every output as one that carries gradient. It
    sends a gradient for every value that it received, and refuses where there is none.

    posts: where messages are begun by themselves, not in batches.
    """

    posts: Posts | None = None

    def begin_alone(self) -> None:
        self.posts = Posts()

    def settle(self) -> None:
        if self.posts is not None:
            self.posts.settle()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        return self._receive(
            FORWARD, fwd_chunk_id, super().get_fwd_recv_ops(fwd_chunk_id)
        )

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        return self._receive(
            BACKWARD, bwd_chunk_id, super().get_bwd_recv_ops(bwd_chunk_id)
        )

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        return self._send(super().get_fwd_send_ops(fwd_chunk_id))

    def _receive(self, kind: str, chunk: int, operations: Any) -> Any:
        """The operations that torch is to begin."""
        if self.posts is None:
            return operations
        self.posts.receive(kind, chunk, operations)
        return []

    def _send(self, operations: Any) -> Any:
        """The operations that torch is to begin."""
        if self.posts is None:
            return operations
        self.posts.send(operations)
        return []

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if self.posts is not None:
            self.posts.arrive(FORWARD, fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if self.posts is not None:
            self.posts.arrive(BACKWARD, bwd_chunk_id)
        return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(
        self,
        backward_type: str,
        bwd_kwargs: dict[str, Any],
        last_backward: bool = False,
    ) -> Any:
        if backward_type != "input":
            return super().backward_maybe_with_nosync(
                backward_type, bwd_kwargs, last_backward
            )
        outputs, grads, inputs = (
            bwd_kwargs[name]
            for name in ("stage_output", "output_grads", "input_values")
        )
        live = [i for i, t in enumerate(outputs) if t.requires_grad]
        wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
        bwd_kwargs |= {
            "stage_output": tuple(outputs[i] for i in live),
            "input_values": wanted,
        }
        if grads is not None:
            bwd_kwargs["output_grads"] = tuple(grads[i] for i in live)
        input_grads, groups = super().backward_maybe_with_nosync(
            backward_type, bwd_kwargs, last_backward
        )
        by_input = dict(zip(map(id, wanted), input_grads, strict=True))
        return tuple(by_input.get(id(t)) for t in inputs), groups

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        if self.has_backward and not self.is_first:
            self.grad_send_info = [
                self.stage_index - 1 if p.grad else None for p in self.received
            ]
            grads = zip(self.received, self.bwd_cache[bwd_chunk_id], strict=True)
            self.bwd_cache[bwd_chunk_id] = tuple(
                grad if p.grad else None for p, grad in grads
            )
        return self._send(super().get_bwd_send_ops(bwd_chunk_id))


class _StaticStage(_EarlierStage):
    """For torch 2.11: gradients flow for the ports that carry one, and for no other."""

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        wanted = self.has_backward and torch.is_grad_enabled()
        infos = self.args_recv_info[fwd_chunk_id]
        return tuple(
            info.buffer.detach().requires_grad_(p.grad and wanted)  # type: ignore[union-attr]
            for info, p in zip(infos, self.received, strict=True)
        )

    def _prepare_forward_infra(  # type: ignore[override]
        self, num_microbatches: int, args: Any, kwargs: Any = None
    ) -> Any:
        backward = self.has_backward
        self.has_backward = False
        infra = super()._prepare_forward_infra(num_microbatches, args, kwargs)
        self.has_backward = backward
        return infra

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        for info, tensor in zip(
            self.args_recv_info[mb_index], as_tuple(prev_stage_outputs), strict=True
        ):
            info.buffer = tensor.detach()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if not self.has_backward:
            return
        self._turn_to(mb_index)
        _fit(self.grad_recv_info[mb_index], self.sent, self.device)
        for info, p, grad in zip(
            self.grad_recv_info[mb_index],
            self.sent,
            next_stage_bwd_outputs,
            strict=False,
        ):
            info.buffer = (
                torch.zeros_like(info.buffer) if p.grad and grad is None else grad
            )

    def _create_grad_recv_info(self, act_send_info: Any) -> Any:
        infos = super()._create_grad_recv_info(act_send_info)
        for info, p in zip(infos, self.sent, strict=False):
            if not p.grad:
                info.buffer = None
        return infos

    def _get_recv_ops(self, recv_infos: Any) -> Any:
        return super()._get_recv_ops(
            tuple(
                info for info in recv_infos if getattr(info, "buffer", None) is not None
            )
        )

    def _get_init_p2p_neighbors_ops(self) -> Any:
        return [
            op
            for op in super()._get_init_p2p_neighbors_ops()
            if op.peer != dist.get_rank()
        ]

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        if self.has_backward and not self.is_first:
            # gradients of received values come first, then those of the stage's own arguments
            grads = self.bwd_cache[bwd_chunk_id]
            self.bwd_cache[bwd_chunk_id] = grads[: len(self.received)]
        return super().get_bwd_send_ops(bwd_chunk_id)


_STAGE = (
    _StaticStage
    if _STATIC_GRADS
    else BuiltStage
    if hasattr(PipelineStage, "_get_grad_send_meta")
    else _EarlierStage
)


@dataclass(frozen=True)
class PipeInfo:
    """The part of a pipe that `build_stage` needs, as `pipe.info()` gives it. It serves stagecut's
    `build_stage`, and torch's own where torch runs the stages right.

    pipe: the pipe itself. has_loss_and_backward: an option of torch's, always False.
    """

    pipe: Staged
    has_loss_and_backward: bool = False

    @property
    def num_stages(self) -> int:
        """The number of stages."""
        return self.pipe.num_stages

    @property
    def graph(self) -> fx.Graph:
        """The calls of the stages, for torch's own stage class. Raises StagecutError when that class would
        get the pipe wrong.
        """
        refuse_torchs_stage(self.pipe.program)
        return split_graph(self.pipe.program)


@near_names
def build_stage(
    stage_module: Any,
    stage_index: int,
    pipe_info: PipeInfo,
    device: torch.device | str,
    group: Group = None,
) -> BuiltStage:
    """Stage `stage_index` of a pipe as torch's PipelineStage, for any of torch's schedules.

    stage_module: the stage, `pipe.get_stage_module(stage_index)`, or a wrapper around it.
    pipe_info: `pipe.info()`.
    device, group: where the stage runs, and the process group whose ranks run the stages.

    Raises StagecutError for a stage that the pipe does not have, for values that cannot cross between
    processes, and where there is no process group.
    """
    stage = make_stage(
        pipe_info.pipe,
        stage_index,
        torch.device(device),
        group,
        pipe_info.pipe._sizes,
        False,
    )
    stage.submod = stage_module
    return stage


def make_stage(
    pipe: Staged,
    index: int,
    device: torch.device,
    group: Group,
    sizes: Sizes,
    fed: bool,
    dtypes: Mapping[Value, torch.dtype] = MappingProxyType({}),
    draws: Draws | None = None,
) -> BuiltStage:
    """Stage `index` of `pipe` for torch's schedules. Its module is moved to `device`; one on meta stays
    there, and must be real when it runs. Values that cross have the `dtypes` that are given, and otherwise
    those of the program.
    """
    if not isinstance(index, int) or not 0 <= index < pipe.num_stages:
        raise StagecutError(
            f"there is no stage {index!r}",
            hint=f"the pipe has {pipe.num_stages} stages, 0 to {pipe.num_stages - 1}",
        )
    _refuse_changes(pipe)
    if not dist.is_available() or not dist.is_initialized():
        raise StagecutError(
            "a stage for torch's schedules runs on a process group, and there is none",
            hint='dist.init_process_group("nccl" or "gloo") under torchrun; pipe(...) runs all stages in one '
            "process",
        )
    stage = pipe.stages[index]
    is_real = not any(t.is_meta for t in (*stage.parameters(), *stage.buffers()))
    if is_real or device.type == "meta":
        stage.to(device)
    built: BuiltStage = _STAGE(pipe, index, device, group, sizes, fed, dtypes, draws)
    built.awaits_values = not is_real
    return built


def as_tuple(output: Any) -> tuple[Any, ...]:
    if isinstance(output, tuple | list):
        return tuple(output)
    return (output,)
