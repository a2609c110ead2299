"""Stages on torch.distributed: `build_stage` gives torch's own PipelineStage, `Driver` runs a schedule of them.

Neighbours exchange flat tuples of contiguous tensors (`backend.wire`), so every schedule that torch has runs every model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.pipelining import PipelineStage, _utils
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from stagecut.backend.mailbox import refuse_feedback, written_inputs
from stagecut.backend.modules import StageModule
from stagecut.backend.run import results_of
from stagecut.backend.wire import Port, Sizes, backward_is_whole, boundaries, fed_inputs, lives_in_buffer, port, writable, writes_explained
from stagecut.faults import Faults
from stagecut.frontend.call import check_inputs
from stagecut.frontend.lower import storage_of
from stagecut.ir.errors import InputError, StagecutError, nearest
from stagecut.ir.graph import Op, Program, StateEntry, Value
from stagecut.ir.objects import opened
from stagecut.ir.printer import fingerprint
from stagecut.ir.types import TensorType
from stagecut.schedules import SCHEDULES, V, homes
from stagecut.state import refuse_meta

if TYPE_CHECKING:
    from stagecut.pipe import Pipe

_TorchMismatch: Any = getattr(_utils, "PipeliningMetadataError", None) or getattr(_utils, "PipeliningShapeError")  # noqa: B009

Group = dist.ProcessGroup | None
_STATIC_GRADS = not hasattr(PipelineStage, "_setup_forward_recv_info")
"""True for the torch whose schedules take every value at a boundary for one with a gradient."""


class MismatchError(InputError, _TorchMismatch):  # type: ignore[misc]
    """A tensor at a boundary has another shape or dtype than the program says."""


class BuiltStage(PipelineStage):
    """A stage of a pipe as torch's schedules know it. `submod` is the stage itself, under the model's names.

    The first stage takes the model's own arguments. With `fed`, every stage takes the model's inputs it reads from
    `microbatches`, one list of flat inputs for each micro-batch; else the first stage hands them on.
    """

    def __init__(self, pipe: Pipe, index: int, device: torch.device, group: Group, sizes: Sizes, fed: bool) -> None:
        program = pipe.program
        refuse_feedback(program, pipe.training)
        lists = boundaries(program, fed_inputs(program) if fed else frozenset())
        last = index == len(program.stages) - 1
        self.pipe, self.fed, self.block = pipe, fed, program.stages[index]
        self.microbatches: list[list[Any]] = []
        self.results: dict[int, tuple[torch.Tensor, ...]] | None = {}
        self.received = [port(v, sizes) for v in lists[index - 1]] if index else []
        self.sent = [port(v, sizes, as_it_is=last) for v in lists[index]]
        self._owned = written_inputs(self.block)
        self._strides = {p.value: p.strides for p in self.received}
        self._kept = {p.value for p in self.sent if lives_in_buffer(p.value)}
        self._fed = [(i, v) for i, v in enumerate(program.inputs) if (v in self.block.inputs or index == 0) and v not in self._strides]
        metas = [tuple(p.meta() for p in ports) for ports in (self.received, self.sent)]
        whole = index > 0 and backward_is_whole(
            self.block, {p.value for p in self.received if p.grad}, {p.value for p in self.sent if p.grad}
        )
        runner = (lambda: _nothing) if whole else None
        super().__init__(pipe.stages[index], index, len(program.stages), device, metas[0], metas[1], group=group, dw_builder=runner)

    def forward_one_chunk(self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True) -> Any:
        """As torch's; with `fed`, the stage's own inputs of this micro-batch go in as keywords."""
        if self.fed:
            args, kwargs = (), {f"input_{i}": self.microbatches[fwd_chunk_id][i] for i, _ in self._fed}
        try:
            output = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        except RuntimeError as error:
            if isinstance(error.__cause__, StagecutError):
                raise error.__cause__ from None
            raise
        if self.is_last and self.results is not None and self.fed:
            self.results[fwd_chunk_id] = tuple(t.detach() for t in _as_tuple(output))
        return output

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what crossed apart, runs the stage, and packs what it hands on."""
        values: dict[Value, Any] = {}
        if self.fed:
            values = {v: kwargs[f"input_{i}"] for i, v in self._fed}
        elif self.is_first:
            values = dict(zip(self.pipe.program.inputs, self._given(args, kwargs), strict=True))
        values |= {p.value: p.unpack(t) for p, t in zip(self.received, () if self.is_first else args, strict=True)}
        inputs = [writable(values[v], self._strides.get(v)) if v in self._owned else values[v] for v in self.block.inputs]
        with writes_explained(self.stage_index):
            results = results_of(super().forward_maybe_with_nosync(*inputs), self.block)
        values |= zip(self.block.outputs, results, strict=True)
        for p in self.sent:
            self._check(p, values[p.value])
        buffers = {storage_of(t) for t in args if isinstance(t, torch.Tensor)} if self.is_last else set()
        packed = [p.pack(values[p.value], self.device) for p in self.sent]
        for place, (p, tensor) in enumerate(zip(self.sent, packed, strict=True)):
            if p.value in self._kept or storage_of(tensor) in buffers:
                packed[place] = tensor.clone()  # it is written again before it is read
        return packed[0] if self.is_last and len(packed) == 1 else tuple(packed)

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False) -> Any:
        """As torch's; the backward of a wrapped or compiled stage is never split, since torch cannot take it apart."""
        if not full_backward and self.stage_index and not (self.dw_builder is None and _is_plain(self.submod)):
            self.dw_builder, last_backward = (lambda: _nothing), bwd_chunk_id + 1 == self.chunks
        return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def _given(self, args: Any, kwargs: Any) -> list[Any]:
        try:
            return self.pipe.flatten(args, kwargs)
        except InputError as error:
            raise MismatchError(error.what, where=error.where, hint=error.hint) from error

    def _check(self, p: Port, item: Any) -> None:
        if p.shape is None or (item.shape == p.shape and item.dtype == p.dtype):
            return
        what = "dtype" if item.dtype != p.dtype else "shape"
        raise MismatchError(
            f"stage {self.stage_index}: {what} mismatch: {p.value!r} is {item.dtype}{list(item.shape)}, expected {p.dtype}{list(p.shape)}",
            where=p.value.owner.where() if isinstance(p.value.owner, Op) else "",
            hint="a hook or a wrapper of the stage changes what it returns",
        )

    def _validate_fwd_input(self, args: Any, kwargs: Any) -> None:
        """The pipe checks what the model is called with."""


def _nothing() -> None:
    """The weights' part of a backward that was run as a whole."""


def _is_plain(module: torch.nn.Module) -> bool:
    """True for a stage as it was made: nothing in it is wrapped, sharded or compiled."""
    return all(
        isinstance(part, StageModule) and not isinstance(part, FSDPModule) and part._compiled_call_impl is None for part in module.modules()
    )


class _StaticStage(BuiltStage):
    """For torch 2.11: gradients flow for the ports that carry one, and for no other."""

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        wanted = self.has_backward and torch.is_grad_enabled()
        infos = self.args_recv_info[fwd_chunk_id]
        return tuple(
            info.buffer.detach().requires_grad_(p.grad and wanted)  # type: ignore[union-attr]
            for info, p in zip(infos, self.received, strict=True)
        )

    def _prepare_forward_infra(self, num_microbatches: int, args: Any, kwargs: Any = None) -> Any:  # type: ignore[override]
        backward, self.has_backward = self.has_backward, False
        made = super()._prepare_forward_infra(num_microbatches, args, kwargs)
        self.has_backward = backward
        return made

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        for info, tensor in zip(self.args_recv_info[mb_index], _as_tuple(prev_stage_outputs), strict=True):
            info.buffer = tensor.detach()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        for info, p, grad in zip(self.grad_recv_info[mb_index], self.sent, next_stage_bwd_outputs, strict=False):
            info.buffer = torch.zeros_like(info.buffer) if p.grad and grad is None else grad

    def _create_grad_recv_info(self, act_send_info: Any) -> Any:
        infos = super()._create_grad_recv_info(act_send_info)
        for info, p in zip(infos, self.sent, strict=False):
            if not p.grad:
                info.buffer = None
        return infos

    def _get_recv_ops(self, recv_infos: Any) -> Any:
        return super()._get_recv_ops(tuple(info for info in recv_infos if getattr(info, "buffer", None) is not None))

    def _get_init_p2p_neighbors_ops(self) -> Any:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.peer != dist.get_rank()]

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False) -> Any:
        if backward_type != "input":
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        outputs, grads, inputs = (bwd_kwargs[name] for name in ("stage_output", "output_grads", "input_values"))
        live = [i for i, t in enumerate(outputs) if t.requires_grad]
        wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
        bwd_kwargs |= {"stage_output": tuple(outputs[i] for i in live), "input_values": wanted}
        bwd_kwargs["output_grads"] = None if grads is None else tuple(grads[i] for i in live)
        found, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        by_input = dict(zip(map(id, wanted), found, strict=True))
        return tuple(by_input.get(id(t)) for t in inputs), groups

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        if self.has_backward and not self.is_first:
            grads = zip(self.received, self.bwd_cache[bwd_chunk_id], strict=False)
            self.grad_send_info = [self.stage_index - 1 for p in self.received if p.grad]
            filled = [torch.zeros(p.wire_shape, dtype=p.wire_dtype, device=self.device) if g is None else g for p, g in grads if p.grad]
            self.bwd_cache[bwd_chunk_id] = tuple(filled)
        return super().get_bwd_send_ops(bwd_chunk_id)


@dataclass(frozen=True)
class PipeInfo:
    """What `build_stage` needs to know of a pipe."""

    pipe: Pipe

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return self.pipe.num_stages


def build_stage(stage_module: Any, stage_index: int, pipe_info: PipeInfo, device: torch.device | str, group: Group = None) -> BuiltStage:
    """Stage `stage_index` of a pipe as torch's PipelineStage, as `Pipe.build_stage`, around `stage_module`: the stage, or a wrapper."""
    made: BuiltStage = pipe_info.pipe.build_stage(stage_index, device, group)
    made.submod = stage_module
    return made


def make_stage(pipe: Pipe, index: int, device: torch.device, group: Group, sizes: Sizes, fed: bool) -> BuiltStage:
    """Stage `index` of `pipe` for torch's schedules. Its module is moved to `device`."""
    if not 0 <= index < pipe.num_stages:
        raise StagecutError(f"there is no stage {index}", hint=f"the pipe has {pipe.num_stages} stages, 0 to {pipe.num_stages - 1}")
    if device.type != "meta" and any(t.is_meta for t in (*pipe.stages[index].parameters(), *pipe.stages[index].buffers())):
        refuse_meta(pipe.program, pipe.stages[index])
    pipe.stages[index].to(device)
    return (_StaticStage if _STATIC_GRADS else BuiltStage)(pipe, index, device, group, sizes, fed)


class Driver:
    """Runs a pipe on the ranks of a group by one of torch's schedules.

    Every rank makes one with the same pipe, and calls `step` with the same arguments: those of the model. Rank r holds
    stages r, r + ranks, ..., or for V schedules r and its mirror image.

    `wrap(module, index)` is called once for each stage of this rank, when its module is on its device; what it returns runs in
    the module's place: FSDP, DDP, activation checkpointing and torch.compile go there. Without `return_outputs`, `step` and `eval`
    return None for the outputs, and those of a micro-batch are let go behind its loss.
    """

    def __init__(
        self,
        pipe: Pipe,
        schedule: str = "1F1B",
        n_microbatches: int = 1,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        group: Group = None,
        device: torch.device | str | None = None,
        scale_grads: bool = True,
        return_outputs: bool = True,
        wrap: Callable[[torch.nn.Module, int], torch.nn.Module] = lambda module, index: module,
    ) -> None:
        self.pipe, self.n_microbatches, self.loss_fn, self.group = pipe, n_microbatches, loss_fn, group
        self.schedule_class = _schedule_class(schedule)
        self.device = torch.device(device) if device is not None else _own_device(group)
        self._scale = 1.0 / n_microbatches if scale_grads else 1.0
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.placement = placement(pipe.num_stages, ranks, self.schedule_class)
        self.stage_indices = tuple(i for i, home in enumerate(self.placement) if home == rank)
        _agree(pipe.program, (schedule, n_microbatches), group)
        self._wrap, self._returns = wrap, return_outputs
        self._last_boundary = boundaries(pipe.program, fed_inputs(pipe.program))[-1]
        self._replicas = [(ranks, entries) for ranks, entries in _replicas(pipe.program, self.placement) if rank in ranks]
        self._schedules: dict[tuple[tuple[str, int], ...], tuple[Any, list[BuiltStage]]] = {}
        self._chunks: list[list[Any]] = []
        self._targets: list[Any] = []
        self._losses: list[torch.Tensor] = []
        self.faults = Faults(group, self.placement)

    @property
    def is_last(self) -> bool:
        """True on the rank that has the last stage, and so the outputs and the losses."""
        return self.pipe.num_stages - 1 in self.stage_indices

    @cached_property
    def modules(self) -> dict[int, torch.nn.Module]:
        """This rank's stages by index, on its device, with what `wrap` puts around them. StagecutError while one is on meta."""
        for i in self.stage_indices:
            refuse_meta(self.pipe.program, self.pipe.stages[i])
        return {i: self._wrap(self.pipe.stages[i].to(self.device), i) for i in self.stage_indices}

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters this rank holds, each once, as `modules` has them."""
        return list(dict.fromkeys(p for i in self.modules for p in self.pipe.stages[i].parameters()))

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> tuple[Any, list[torch.Tensor]]:
        """One step on a whole batch: the model's own arguments, the same on every rank.

        Returns the outputs in the model's structure and the loss of each micro-batch on the last stage's rank, (None, [])
        elsewhere. With a loss function, gradients are accumulated, divided by the number of micro-batches.

        Raises InputError when the arguments do not fit, and RankError on every rank when a rank fails or dies (`stagecut.faults`).
        """
        return self._run(args, kwargs, target, "step")

    def eval(self, *args: Any, target: Any = None, **kwargs: Any) -> tuple[Any, list[torch.Tensor]]:
        """As `step`, forward only. The mode stays: `pipe.eval()` and `pipe.train()`, on every rank, switch dropout and norms."""
        with torch.no_grad():
            return self._run(args, kwargs, target, "eval")

    def _run(self, args: Any, kwargs: Any, target: Any, how: str) -> tuple[Any, list[torch.Tensor]]:
        with self.faults.alike():
            if any(entry.share == "feedback" for entry in self.pipe.program.state):
                refuse_feedback(self.pipe.program, self.pipe.training)  # the pipe may have been switched since the stages were made
            sizes = self._split(args, kwargs)
            self._targets, self._losses = _split_target(target, self.n_microbatches), []
            schedule, stages = self._prepared(sizes)
        for stage in stages:
            stage.microbatches, stage.results = self._chunks, {} if self._returns else None
        numbers = torch.arange(self.n_microbatches) if self.is_last and self.loss_fn is not None else None
        with self.faults.together():
            getattr(schedule, how)(target=numbers, losses=[] if numbers is not None else None, return_outputs=False)
        if not self.is_last:
            return None, []
        results = next(s for s in stages if s.is_last).results
        if results is None:
            return None, self._losses
        structured = [self._structure(results[i], i) for i in range(self.n_microbatches)]
        return self._merge(structured), self._losses

    def _prepared(self, sizes: dict[str, int]) -> tuple[Any, list[BuiltStage]]:
        """The schedule and its stages for these sizes, made at their first use."""
        key = tuple(sorted(sizes.items()))
        if key not in self._schedules:
            stages = [make_stage(self.pipe, i, self.device, self.group, sizes, True) for i in self.stage_indices]
            for stage in stages:
                stage.submod = self.modules[stage.stage_index]
            single = issubclass(self.schedule_class, PipelineScheduleSingle)
            loss = self._loss if self.loss_fn is not None else None
            made = self.schedule_class(stages[0] if single else stages, self.n_microbatches, loss_fn=loss, scale_grads=False)
            self._schedules[key] = made, stages
        return self._schedules[key]

    def _loss(self, output: Any, number: torch.Tensor) -> torch.Tensor:
        """The user's loss of one micro-batch; torch passes its number for a target."""
        index = int(number)
        result = self._structure(_as_tuple(output), index)
        assert self.loss_fn is not None
        loss = self.loss_fn(result, self._targets[index]) if self._targets else self.loss_fn(result)
        self._losses.append(loss.detach())
        return loss * self._scale

    def _structure(self, packed: Sequence[torch.Tensor], chunk: int) -> Any:
        """The model's own output of one micro-batch."""
        program = self.pipe.program
        made = dict(zip(self._last_boundary, packed, strict=True))
        given = {v: item for v, item in zip(program.inputs, self._chunks[chunk], strict=True) if v not in made}
        flat = [
            leaf if not isinstance(leaf, Value)
            else given[leaf] if leaf in given
            else made[leaf] if isinstance(leaf.type, TensorType) else made[leaf].item()
            for leaf in program.outputs
        ]  # fmt: skip
        spec = self.pipe._call_spec
        return spec.unflatten(flat) if spec is not None else flat

    def _merge(self, outputs: list[Any]) -> Any:
        """The outputs of all micro-batches as those of one batch: joined along dim 0; a number is their mean."""
        return tree_map(_join, *map(opened, outputs))

    def _split(self, args: Any, kwargs: Any) -> dict[str, int]:
        """Sets the flat inputs of every micro-batch; the symbolic sizes of one."""
        spec = self.pipe._call_spec
        flat = spec.flatten(args, kwargs) if spec is not None else list(args)
        inputs, count = self.pipe.program.inputs, self.n_microbatches
        batch = _batch_symbol(inputs)
        parts = [_chunks(v, item, count, batch) for v, item in zip(inputs, flat, strict=True)]
        self._chunks = [[_to(part[i], self.device) for part in parts] for i in range(count)]
        return check_inputs(inputs, self._chunks[0], spec.ranges if spec is not None else None)  # all chunks have the same sizes

    def sync_shared_gradients(self) -> None:
        """Every replica of a tied parameter has the sum of the gradients of all. Each rank of the pipeline calls it."""
        for ranks, entries in self._replicas:
            held = _held(self.pipe, entries, self.stage_indices)
            with self.faults.together():
                _sum_gradients([same for same in held if len(ranks) > 1 or len(same) > 1], ranks, self.group)

    def attach(self, optimizer: Optimizer) -> None:
        """`sync_shared_gradients` runs before every step of `optimizer`."""
        optimizer.register_step_pre_hook(lambda *_: self.sync_shared_gradients())


def _schedule_class(name: str) -> Any:
    try:
        return get_schedule_class(name)
    except ValueError:
        raise StagecutError(f"there is no schedule '{name}'", hint=f"{nearest(name, SCHEDULES)}; known: {', '.join(SCHEDULES)}") from None


def placement(stages: int, ranks: int, schedule: Any) -> list[int]:
    """Stage -> rank under a schedule class of torch. Raises StagecutError when it cannot place that many."""
    name = schedule.__name__
    v = name.removeprefix("Schedule") in V
    if issubclass(schedule, PipelineScheduleMulti):
        if stages % ranks or (v and stages != 2 * ranks):
            raise StagecutError(
                f"{name} cannot place {stages} stages on {ranks} ranks", hint=f"cut into {2 * ranks} stages" if v else "cut into a multiple"
            )
    elif stages != ranks:
        raise StagecutError(f"{name} has one stage a rank: {stages} stages, {ranks} ranks", hint=f"cut into {ranks} stages")
    return homes(stages, ranks, v)


def _own_device(group: Group) -> torch.device:
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _agree(program: Program, settings: tuple[Any, ...], group: Group) -> None:
    """Raises StagecutError on every rank when the ranks have cut different programs. Each may have traced on a device of its own."""
    mine = (fingerprint(program)[:16], program.name, len(program.stages), *settings)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group)
    odd = [rank for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise StagecutError(
            f"the ranks do not run the same program: rank {odd[0]} has {found[odd[0]]}, rank 0 has {found[0]}",
            where="fingerprint, model, stages, schedule, micro-batches",
            hint="build the same model with the same cuts on every rank",
        )


def _batch_symbol(inputs: Sequence[Value]) -> str | None:
    """The symbolic size that is the batch: that of the first input whose first dim varies."""
    for value in inputs:
        if isinstance(value.type, TensorType) and value.type.shape and isinstance(value.type.shape[0], str):
            return value.type.shape[0]
    return None


def _chunks(value: Value, item: Any, count: int, batch: str | None) -> list[Any]:
    """One input of the whole batch as that of each micro-batch; what has no batch dimension is the same for all."""
    kind = value.type
    if count == 1 or not isinstance(item, torch.Tensor) or not isinstance(kind, TensorType) or item.dim() != len(kind.shape):
        return [item] * count
    dim = next((d for d, want in enumerate(kind.shape) if want == batch and batch is not None), None)
    if dim is None:
        dim = next((d for d, want in enumerate(kind.shape) if isinstance(want, int) and item.shape[d] == count * want != want), None)
    if dim is None:
        return [item] * count
    if item.shape[dim] % count:
        raise InputError(
            f"input '{value.hint}' has a batch of {item.shape[dim]}, which {count} micro-batches do not divide",
            hint="pass a multiple of n_microbatches",
        )
    return list(item.chunk(count, dim))


def _split_target(target: Any, count: int) -> list[Any]:
    if target is None:
        return []

    def part(item: Any, index: int) -> Any:
        return item.tensor_split(count)[index] if isinstance(item, torch.Tensor) and item.dim() else item

    return [tree_map(lambda item, i=i: part(item, i), target) for i in range(count)]


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, torch.Tensor) else item


def _join(*items: Any) -> Any:
    if not isinstance(items[0], torch.Tensor):
        return items[0]
    if items[0].dim():
        return torch.cat(items)
    return torch.stack(items).mean() if items[0].is_floating_point() else items[0]


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _replicas(program: Program, homes: Sequence[int]) -> list[tuple[tuple[int, ...], list[StateEntry]]]:
    """The parameters of several stages by the ranks that hold them, in the same order everywhere."""
    by_ranks: dict[tuple[int, ...], list[StateEntry]] = {}
    for entry in program.state:
        if entry.kind == "param" and len(entry.stages) > 1:
            by_ranks.setdefault(tuple(sorted({homes[stage] for stage in entry.stages})), []).append(entry)
    return sorted(by_ranks.items(), key=lambda item: item[0])


def _held(pipe: Pipe, entries: Sequence[StateEntry], stages: Sequence[int]) -> list[list[torch.nn.Parameter]]:
    """The tensors this rank holds for each parameter: several where stages of this rank were sharded each by itself."""
    found: list[dict[torch.nn.Parameter, None]] = [{} for _ in entries]
    for index in stages:
        names = {clean_tensor_name(name): p for name, p in pipe.stages[index].named_parameters(remove_duplicate=False)}
        for entry, tensors in zip(entries, found, strict=True):
            if index in entry.stages:
                tensors[names[pipe.program.stages[index].state[entry][0]]] = None
    return [list(tensors) for tensors in found]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sum_gradients(replicas: Sequence[list[torch.nn.Parameter]], ranks: tuple[int, ...], group: Group) -> None:
    """Each replica of a parameter has the sum of the gradients of all, here and on `ranks`; none where none has one."""
    for dtype in dict.fromkeys(same[0].dtype for same in replicas):
        mine = [same for same in replicas if same[0].dtype == dtype]
        grads = [[_local(p.grad.detach()) for p in same if p.grad is not None] for same in mine]
        parts = [torch.stack(g).sum(0) if g else torch.zeros_like(_local(same[0])) for g, same in zip(grads, mine, strict=True)]
        packed = torch.cat([*(p.flatten() for p in parts), parts[0].new_tensor([float(bool(g)) for g in grads])])
        *sums, counts = _total(packed, ranks, group).split([*(p.numel() for p in parts), len(mine)])
        for same, made, count in zip(mine, sums, counts.tolist(), strict=True):
            for parameter in same if count else ():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                _local(parameter.grad).copy_(made.view_as(_local(parameter)))


def _total(mine: torch.Tensor, ranks: tuple[int, ...], group: Group) -> torch.Tensor:
    """The sum of a tensor over some ranks of the group, bit for bit the same on each.

    They send to each other: a group of their own would have to be made by all processes there are, those of other pipelines
    too.
    """
    if len(ranks) == dist.get_world_size(group):
        dist.all_reduce(mine, group=group)
        return mine
    me = dist.get_rank(group)
    parts = {rank: mine if rank == me else torch.empty_like(mine) for rank in ranks}
    others = [rank for rank in ranks if rank != me]
    ops = [dist.P2POp(dist.isend, mine, group=group, group_peer=rank) for rank in others]
    ops += [dist.P2POp(dist.irecv, parts[rank], group=group, group_peer=rank) for rank in others]
    for work in dist.batch_isend_irecv(ops) if ops else ():
        work.wait()
    return torch.stack(list(parts.values())).sum(0)
