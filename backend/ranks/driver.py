"""`Driver` runs a schedule of stages on torch.distributed, one process a rank, and trains a model with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stagecut.backend.ranks.batch import ChunkSpecs, MicroBatches
from stagecut.backend.ranks.faults import Faults
from stagecut.backend.ranks.stage import BuiltStage, Group, as_tuple, make_stage
from stagecut.backend.ranks.wire import Sizes
from stagecut.backend.schedules import SCHEDULES, V, homes
from stagecut.backend.stages.crossing import refuse_feedback
from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import refuse_meta
from stagecut.ir.errors import StagecutError, nearest
from stagecut.ir.graph import Program, StateEntry
from stagecut.ir.text.printer import fingerprint


class Driver:
    """Runs a pipe on the ranks of a group by one of torch's schedules.

    Every rank makes one with the same pipe, and calls `step` with the same arguments: those of the model.
    Rank r holds stages r, r + ranks, ..., or for V schedules r and its mirror image.

    `wrap(module, index)` is called once for each stage of this rank, when its module is on its device. The
    module that it returns runs in the place of the stage's own: FSDP, DDP, activation checkpointing and
    torch.compile go there. Without `return_outputs`, `step` and `eval` return None for the outputs, and the
    outputs of a micro-batch are released after its loss.

    The program knows along which dims a batch is divided and outputs are joined. `args_chunk_spec`,
    `kwargs_chunk_spec`, `target_chunk_spec` and `output_merge_spec` say it in its place, as for torch's
    schedules.
    """

    def __init__(
        self,
        pipe: Staged,
        schedule: str = "1F1B",
        n_microbatches: int = 1,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        group: Group = None,
        device: torch.device | str | None = None,
        scale_grads: bool = True,
        return_outputs: bool = True,
        wrap: Callable[
            [torch.nn.Module, int], torch.nn.Module
        ] = lambda module, index: module,
        *,
        args_chunk_spec: Sequence[Any] | None = None,
        kwargs_chunk_spec: Mapping[str, Any] | None = None,
        target_chunk_spec: Any = None,
        output_merge_spec: Any = None,
    ) -> None:
        self.pipe = pipe
        self.n_microbatches = n_microbatches
        self.loss_fn = loss_fn
        self.group = group
        self.schedule_class = _schedule_class(schedule)
        self.device = torch.device(device) if device is not None else _own_device(group)
        self._scale = 1.0 / n_microbatches if scale_grads else 1.0
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.placement = placement(pipe.num_stages, ranks, self.schedule_class)
        self.stage_indices = tuple(
            i for i, home in enumerate(self.placement) if home == rank
        )
        _agree(pipe.program, (schedule, n_microbatches), group)
        self._wrap, self._returns = wrap, return_outputs
        specs = ChunkSpecs(
            args_chunk_spec, kwargs_chunk_spec, target_chunk_spec, output_merge_spec
        )
        self._batch = MicroBatches(pipe, n_microbatches, self.device, group, specs)
        self._replicas = [
            (ranks, entries)
            for ranks, entries in _replicas(pipe.program, self.placement)
            if rank in ranks
        ]
        self._schedule: tuple[Any, list[BuiltStage]] | None = None
        self._losses: list[torch.Tensor] = []
        self.faults = Faults(group, self.placement)

    @property
    def is_last(self) -> bool:
        """True on the rank that has the last stage, and so the outputs and the losses."""
        return self.pipe.num_stages - 1 in self.stage_indices

    @cached_property
    def modules(self) -> dict[int, torch.nn.Module]:
        """This rank's stages by index, on its device, with the wrappers of `wrap`. Raises StagecutError while
        one is on meta.
        """
        for i in self.stage_indices:
            refuse_meta(self.pipe.program, self.pipe.stages[i])
        return {
            i: self._wrap(self.pipe.stages[i].to(self.device), i)
            for i in self.stage_indices
        }

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters this rank holds, each once, as they are in `modules`."""
        return list(
            dict.fromkeys(
                p for i in self.modules for p in self.pipe.stages[i].parameters()
            )
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """The outputs of the steps so far that could not be put together, and why."""
        return tuple(self._batch.notes)

    def step(
        self,
        *args: Any,
        target: Any = None,
        arg_mbs: Sequence[Any] | None = None,
        kwarg_mbs: Sequence[Any] | None = None,
        target_mbs: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, list[torch.Tensor]]:
        """One step on a whole batch: the model's own arguments, the same on every rank. Or on micro-batches
        as they are, of any number of samples: `arg_mbs`, `kwarg_mbs`, `target_mbs`.

        Returns the outputs in the model's structure and the loss of each micro-batch on the last stage's
        rank, (None, []) elsewhere. With a loss function, gradients are accumulated, divided by the number of
        micro-batches.

        Raises InputError when the arguments do not fit, and RankError on every rank when a rank fails or dies
        (backend/ranks/faults.py).
        """
        ready = arg_mbs, kwarg_mbs, target_mbs
        return self._run(args, kwargs, target, ready, "step")

    def eval(
        self,
        *args: Any,
        target: Any = None,
        arg_mbs: Sequence[Any] | None = None,
        kwarg_mbs: Sequence[Any] | None = None,
        target_mbs: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, list[torch.Tensor]]:
        """As `step`, forward only. The mode stays: `pipe.eval()` and `pipe.train()`, on every rank, switch
        dropout and norms.
        """
        with torch.no_grad():
            ready = arg_mbs, kwarg_mbs, target_mbs
            return self._run(args, kwargs, target, ready, "eval")

    def _run(
        self, args: Any, kwargs: Any, target: Any, ready: Any, how: str
    ) -> tuple[Any, list[torch.Tensor]]:
        with self.faults.alike():
            if any(entry.share == "feedback" for entry in self.pipe.program.state):
                # the pipe may have been switched since the stages were made
                refuse_feedback(self.pipe.program, self.pipe.training)
            sizes = self._batch.of_call(args, kwargs, target, *ready)
            self._losses = []
            schedule, stages = self._prepared(sizes)
        for stage in stages:
            stage.microbatches = self._batch.inputs
            stage.results = {} if self._returns else None
        numbers = (
            torch.arange(self.n_microbatches)
            if self.is_last and self.loss_fn is not None
            else None
        )
        with self.faults.together():
            getattr(schedule, how)(
                target=numbers,
                losses=[] if numbers is not None else None,
                return_outputs=False,
            )
        if not self.is_last:
            return None, []
        results = next(s for s in stages if s.is_last).results
        if results is None:
            return None, self._losses
        return self._batch.joined(results), self._losses

    def _prepared(self, sizes: list[Sizes]) -> tuple[Any, list[BuiltStage]]:
        """The schedule and its stages, for micro-batches of these sizes. They are made once, and receive into
        buffers of the sizes of the step.
        """
        if self._schedule is None:
            stages = [
                make_stage(self.pipe, i, self.device, self.group, sizes[0], True)
                for i in self.stage_indices
            ]
            for stage in stages:
                stage.submod = self.modules[stage.stage_index]
            single = issubclass(self.schedule_class, PipelineScheduleSingle)
            loss = self._loss if self.loss_fn is not None else None
            schedule = self.schedule_class(
                stages[0] if single else stages,
                self.n_microbatches,
                loss_fn=loss,
                scale_grads=False,
            )
            self._schedule = schedule, stages
        for stage in self._schedule[1]:
            stage.resize(sizes)
        return self._schedule

    def _loss(self, output: Any, number: torch.Tensor) -> torch.Tensor:
        """The user's loss of one micro-batch; torch passes its number for a target."""
        index = int(number)
        result = self._batch.structured(as_tuple(output), index)
        assert self.loss_fn is not None
        targets = self._batch.targets
        loss = self.loss_fn(result, targets[index]) if targets else self.loss_fn(result)
        self._losses.append(loss.detach())
        return loss * self._scale

    def sync_shared_gradients(self) -> None:
        """Every replica of a tied parameter has the sum of the gradients of all replicas. Each rank of the
        pipeline calls it.
        """
        for ranks, entries in self._replicas:
            held = _held(self.pipe, entries, self.stage_indices)
            with self.faults.together():
                _sum_gradients(
                    [same for same in held if len(ranks) > 1 or len(same) > 1],
                    ranks,
                    self.group,
                )

    def attach(self, optimizer: Optimizer) -> None:
        """`sync_shared_gradients` runs before every step of `optimizer`."""
        optimizer.register_step_pre_hook(lambda *_: self.sync_shared_gradients())


def _schedule_class(name: str) -> Any:
    try:
        return get_schedule_class(name)
    except ValueError:
        raise StagecutError(
            f"there is no schedule '{name}'",
            hint=f"{nearest(name, SCHEDULES)}; known: {', '.join(SCHEDULES)}",
        ) from None


def placement(stages: int, ranks: int, schedule: Any) -> list[int]:
    """Stage -> rank under a schedule class of torch. Raises StagecutError when it cannot place so many
    stages.
    """
    name = schedule.__name__
    v = name.removeprefix("Schedule") in V
    if issubclass(schedule, PipelineScheduleMulti):
        if stages % ranks or (v and stages != 2 * ranks):
            raise StagecutError(
                f"{name} cannot place {stages} stages on {ranks} ranks",
                hint=f"cut into {2 * ranks} stages" if v else "cut into a multiple",
            )
    elif stages != ranks:
        raise StagecutError(
            f"{name} has one stage a rank: {stages} stages, {ranks} ranks",
            hint=f"cut into {ranks} stages",
        )
    return homes(stages, ranks, v)


def _own_device(group: Group) -> torch.device:
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _agree(program: Program, settings: tuple[Any, ...], group: Group) -> None:
    """Raises StagecutError on every rank when the ranks have cut different programs. Each rank may have
    traced on a device of its own.
    """
    mine = (fingerprint(program)[:16], program.name, len(program.stages), *settings)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group)
    odd = [rank for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise StagecutError(
            f"the ranks do not run the same program: rank {odd[0]} has {found[odd[0]]}, rank 0 has "
            f"{found[0]}",
            where="fingerprint, model, stages, schedule, micro-batches",
            hint="build the same model with the same cuts on every rank",
        )


def _replicas(
    program: Program, homes: Sequence[int]
) -> list[tuple[tuple[int, ...], list[StateEntry]]]:
    """The parameters of several stages by the ranks that hold them, in the same order everywhere."""
    by_ranks: dict[tuple[int, ...], list[StateEntry]] = {}
    for entry in program.state:
        if entry.kind == "param" and len(entry.stages) > 1:
            by_ranks.setdefault(
                tuple(sorted({homes[stage] for stage in entry.stages})), []
            ).append(entry)
    return sorted(by_ranks.items(), key=lambda item: item[0])


def _held(
    pipe: Staged, entries: Sequence[StateEntry], stages: Sequence[int]
) -> list[list[torch.nn.Parameter]]:
    """The tensors that this rank holds for each parameter: several where stages of this rank were sharded
    separately.
    """
    found: list[dict[torch.nn.Parameter, None]] = [{} for _ in entries]
    for index in stages:
        names = {
            clean_tensor_name(name): p
            for name, p in pipe.stages[index].named_parameters(remove_duplicate=False)
        }
        for entry, tensors in zip(entries, found, strict=True):
            if index in entry.stages:
                tensors[names[pipe.program.stages[index].state[entry][0]]] = None
    return [list(tensors) for tensors in found]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


LARGE = 2**20
"""A gradient of so many elements or more is summed in place: packing it costs more than a message of
its own.
"""


def _sum_gradients(
    replicas: Sequence[list[torch.nn.Parameter]], ranks: tuple[int, ...], group: Group
) -> None:
    """Each replica of a parameter has the sum of the gradients of all replicas, here and on `ranks`; it has
    none where no replica has one.

    The host waits for the device only where a gradient is missing here.
    """
    for dtype in dict.fromkeys(same[0].dtype for same in replicas):
        mine = [same for same in replicas if same[0].dtype == dtype]
        parts = [_gradient(same) for same in mine]
        missing = [
            place
            for place, same in enumerate(mine)
            if all(p.grad is None for p in same)
        ]
        counts = parts[0].new_ones(len(mine))
        for place in missing:
            counts[place] = 0
        small = [
            place
            for place, part in enumerate(parts)
            if part.numel() < LARGE or not part.is_contiguous()
        ]
        packed = torch.cat([*(parts[place].flatten() for place in small), counts])
        *sums, counts = _total(packed, ranks, group).split(
            [*(parts[place].numel() for place in small), len(mine)]
        )
        totals = dict(zip(small, sums, strict=True))
        totals |= {
            place: _total(part, ranks, group)
            for place, part in enumerate(parts)
            if place not in totals
        }
        nowhere = {place for place in missing if not counts[place].item()}
        for place, same in enumerate(mine):
            if place not in nowhere:
                _give(same, totals[place])


def _gradient(same: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The sum of the gradients of the replicas here: the gradient itself where there is one, zeros where
    there is none.
    """
    grads = [_local(p.grad.detach()) for p in same if p.grad is not None]
    if not grads:
        return torch.zeros_like(_local(same[0]))
    return grads[0] if len(grads) == 1 else torch.stack(grads).sum(0)


def _give(same: Sequence[torch.nn.Parameter], total: torch.Tensor) -> None:
    """All replicas here have `total` as their gradient."""
    for parameter in same:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = _local(parameter.grad)
        if grad.data_ptr() != total.data_ptr():
            grad.copy_(total.view_as(grad))


def _total(mine: torch.Tensor, ranks: tuple[int, ...], group: Group) -> torch.Tensor:
    """The sum of a tensor over some ranks of the group, bit for bit the same on each.

    The ranks send to each other. A process group of their own would have to be made by all processes there
    are, including those of other pipelines.
    """
    if len(ranks) == dist.get_world_size(group):
        dist.all_reduce(mine, group=group)
        return mine
    me = dist.get_rank(group)
    parts = {rank: mine if rank == me else torch.empty_like(mine) for rank in ranks}
    others = [rank for rank in ranks if rank != me]
    ops = [
        dist.P2POp(dist.isend, mine, group=group, group_peer=rank) for rank in others
    ]
    ops += [
        dist.P2POp(dist.irecv, parts[rank], group=group, group_peer=rank)
        for rank in others
    ]
    for work in dist.batch_isend_irecv(ops) if ops else ():
        work.wait()
    return torch.stack(list(parts.values())).sum(0)
