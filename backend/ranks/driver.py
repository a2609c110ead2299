"""`Driver` runs a schedule of stages on torch.distributed, one process a rank, and trains a model with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from stagecut.backend.ranks.faults import Faults
from stagecut.backend.ranks.gradients import Gradients
from stagecut.backend.ranks.precision import Dtypes, Precision
from stagecut.backend.ranks.stage import BuiltStage, Group, as_tuple, make_stage
from stagecut.backend.ranks.wire import Sizes, boundaries, fed_inputs
from stagecut.backend.schedules import SCHEDULES, V, homes
from stagecut.backend.stages.crossing import refuse_feedback
from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import refuse_meta
from stagecut.ir.errors import InputError, StagecutError, nearest
from stagecut.ir.graph import Program, Value
from stagecut.ir.run.call import check_inputs
from stagecut.ir.run.objects import opened
from stagecut.ir.text.printer import fingerprint
from stagecut.ir.types import TensorType


class Driver:
    """Runs a pipe on the ranks of a group by one of torch's schedules.

    Every rank makes one with the same pipe, and calls `step` with the same arguments: those of the model.
    Rank r holds stages r, r + ranks, ..., or for V schedules r and its mirror image.

    `wrap(module, index)` is called once for each stage of this rank, when its module is on its device. The
    module that it returns runs in the place of the stage's own: FSDP, DDP, activation checkpointing and
    torch.compile go there. Without `return_outputs`, `step` and `eval` return None for the outputs, and the
    outputs of a micro-batch are released after its loss.
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
        self._last_boundary = boundaries(pipe.program, fed_inputs(pipe.program))[-1]
        self._schedules: dict[Any, tuple[Any, list[BuiltStage]]] = {}
        self._chunks: list[list[Any]] = []
        self._targets: list[Any] = []
        self._losses: list[torch.Tensor] = []
        self.faults = Faults(group, self.placement)
        self.gradients = Gradients(
            pipe, self.placement, group, self.device, self.faults
        )
        self.precision = Precision(
            pipe, self.placement, group, self.device, self.faults
        )

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

    def step(
        self, *args: Any, target: Any = None, **kwargs: Any
    ) -> tuple[Any, list[torch.Tensor]]:
        """One step on a whole batch: the model's own arguments, the same on every rank.

        Returns the outputs in the model's structure and the loss of each micro-batch on the last stage's
        rank, (None, []) elsewhere. With a loss function, gradients are accumulated, divided by the number of
        micro-batches.

        Raises InputError when the arguments do not fit, and RankError on every rank when a rank fails or dies
        (backend/ranks/faults.py).
        """
        return self._run(args, kwargs, target, "step")

    def eval(
        self, *args: Any, target: Any = None, **kwargs: Any
    ) -> tuple[Any, list[torch.Tensor]]:
        """As `step`, forward only. The mode stays: `pipe.eval()` and `pipe.train()`, on every rank, switch
        dropout and norms.
        """
        with torch.no_grad():
            return self._run(args, kwargs, target, "eval")

    def _run(
        self, args: Any, kwargs: Any, target: Any, how: str
    ) -> tuple[Any, list[torch.Tensor]]:
        schedule, stages = self._ready(args, kwargs, target)
        for stage in stages:
            stage.microbatches = self._chunks
            stage.results = {} if self._returns else None
        numbers = (
            torch.arange(self.n_microbatches)
            if self.is_last and self.loss_fn is not None
            else None
        )
        if how == "step" and self.loss_fn is not None:
            self.gradients.tied.accumulate()
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
        structured = [
            self._structure(results[i], i) for i in range(self.n_microbatches)
        ]
        return self._merge(structured), self._losses

    def _ready(
        self, args: Any, kwargs: Any, target: Any
    ) -> tuple[Any, list[BuiltStage]]:
        """The schedule and the stages for a batch, which is split."""
        with self.faults.alike():
            modules = self.modules
        if self._on_any_rank(self.precision.changed_here()):
            self.precision.agree(modules)
        with self.faults.alike():
            if any(entry.share == "feedback" for entry in self.pipe.program.state):
                # the pipe may have been switched since the stages were made
                refuse_feedback(self.pipe.program, self.pipe.training)
            sizes = self._split(args, kwargs)
            self._targets, self._losses = _split_target(target, self.n_microbatches), []
        dtypes = self.precision.dtypes(
            lambda index, dtypes: self._made(index, sizes, dtypes)
        )
        with self.faults.alike():
            return self._prepared(sizes, dtypes)

    def _on_any_rank(self, flag: bool) -> bool:
        anywhere = torch.tensor(int(flag), device=self.device)
        with self.faults.together():
            dist.all_reduce(anywhere, dist.ReduceOp.MAX, self.group)
        return bool(anywhere)

    def _made(self, index: int, sizes: Sizes, dtypes: Dtypes) -> BuiltStage:
        """A stage for torch's schedules, with the module that `wrap` made of it."""
        stage = make_stage(
            self.pipe, index, self.device, self.group, sizes, True, dtypes
        )
        stage.submod, stage.microbatches = self.modules[index], self._chunks
        return stage

    def _prepared(self, sizes: Sizes, dtypes: Dtypes) -> tuple[Any, list[BuiltStage]]:
        """The schedule and its stages for these sizes and dtypes, made at their first use."""
        key = tuple(sorted(sizes.items())), tuple(dtypes.values())
        if key not in self._schedules:
            stages = [self._made(i, sizes, dtypes) for i in self.stage_indices]
            single = issubclass(self.schedule_class, PipelineScheduleSingle)
            loss = self._loss if self.loss_fn is not None else None
            made = self.schedule_class(
                stages[0] if single else stages,
                self.n_microbatches,
                loss_fn=loss,
                scale_grads=False,
            )
            self._schedules[key] = made, stages
        return self._schedules[key]

    def _loss(self, output: Any, number: torch.Tensor) -> torch.Tensor:
        """The user's loss of one micro-batch; torch passes its number for a target."""
        index = int(number)
        result = self._structure(as_tuple(output), index)
        assert self.loss_fn is not None
        loss = (
            self.loss_fn(result, self._targets[index])
            if self._targets
            else self.loss_fn(result)
        )
        self._losses.append(loss.detach())
        return self.gradients.scaled(loss * self._scale)

    def _structure(self, packed: Sequence[torch.Tensor], chunk: int) -> Any:
        """The model's own output of one micro-batch."""
        program = self.pipe.program
        made = dict(zip(self._last_boundary, packed, strict=True))
        given = {
            v: item
            for v, item in zip(program.inputs, self._chunks[chunk], strict=True)
            if v not in made
        }
        flat = [
            leaf
            if not isinstance(leaf, Value)
            else given[leaf]
            if leaf in given
            else made[leaf]
            if isinstance(leaf.type, TensorType)
            else made[leaf].item()
            for leaf in program.outputs
        ]
        spec = self.pipe._call_spec
        return spec.unflatten(flat) if spec is not None else flat

    def _merge(self, outputs: list[Any]) -> Any:
        """The outputs of all micro-batches as those of one batch: tensors are joined along dim 0; a number
        becomes the mean.
        """
        return tree_map(_join, *map(opened, outputs))

    def _split(self, args: Any, kwargs: Any) -> dict[str, int]:
        """Sets the flat inputs of every micro-batch; returns the symbolic sizes of one."""
        spec = self.pipe._call_spec
        flat = spec.flatten(args, kwargs) if spec is not None else list(args)
        inputs, count = self.pipe.program.inputs, self.n_microbatches
        batch = _batch_symbol(inputs)
        parts = [
            _chunks(v, item, count, batch) for v, item in zip(inputs, flat, strict=True)
        ]
        self._chunks = [
            [_to(part[i], self.device) for part in parts] for i in range(count)
        ]
        # all chunks have the same sizes
        return check_inputs(
            inputs,
            self._chunks[0],
            spec.ranges if spec is not None else None,
            cast=self.precision.agreed.change is not None,
        )

    def sync_shared_gradients(self) -> None:
        """Every replica of a tied parameter has the sum of the gradients of all replicas. Each rank of the
        pipeline calls it.
        """
        self.gradients.tied.sum()

    def attach(self, optimizer: Optimizer | None) -> None:
        """Before every update by `optimizer`, tied gradients are summed, and a GradScaler decides as on the
        other ranks. Does nothing for None, the optimizer of a rank that trains nothing.
        """
        if optimizer is not None:
            self.gradients.attach(optimizer)

    def attach_scaler(self, scaler: GradScaler) -> None:
        """The backward of every step starts from the scaled loss; `step` returns losses that are not scaled.
        Every rank attaches one of its own.
        """
        self.gradients.attach_scaler(scaler)

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        """As torch's, over all ranks: tied gradients are summed first and counted once. Every rank calls it
        and gets the same norm.

        Raises NonFiniteError on every rank.
        """
        return self.gradients.clip_norm(
            max_norm, norm_type, error_if_nonfinite, foreach
        )


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


def _batch_symbol(inputs: Sequence[Value]) -> str | None:
    """The symbolic size of the batch: that of the first input whose first dim varies."""
    for value in inputs:
        if (
            isinstance(value.type, TensorType)
            and value.type.shape
            and isinstance(value.type.shape[0], str)
        ):
            return value.type.shape[0]
    return None


def _chunks(value: Value, item: Any, count: int, batch: str | None) -> list[Any]:
    """One input of the whole batch, split for the micro-batches. An input without a batch dimension is the
    same for all.
    """
    kind = value.type
    if (
        count == 1
        or not isinstance(item, torch.Tensor)
        or not isinstance(kind, TensorType)
        or item.dim() != len(kind.shape)
    ):
        return [item] * count
    dim = next(
        (d for d, want in enumerate(kind.shape) if want == batch and batch is not None),
        None,
    )
    if dim is None:
        dim = next(
            (
                d
                for d, want in enumerate(kind.shape)
                if isinstance(want, int) and item.shape[d] == count * want != want
            ),
            None,
        )
    if dim is None:
        return [item] * count
    if item.shape[dim] % count:
        raise InputError(
            f"input '{value.hint}' has a batch of {item.shape[dim]}, which {count} micro-batches do not "
            "divide",
            hint="pass a multiple of n_microbatches",
        )
    return list(item.chunk(count, dim))


def _split_target(target: Any, count: int) -> list[Any]:
    if target is None:
        return []

    def part(item: Any, index: int) -> Any:
        return (
            item.tensor_split(count)[index]
            if isinstance(item, torch.Tensor) and item.dim()
            else item
        )

    return [tree_map(lambda item, i=i: part(item, i), target) for i in range(count)]


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, torch.Tensor) else item


def _join(*items: Any) -> Any:
    if not isinstance(items[0], torch.Tensor):
        return items[0]
    if items[0].dim():
        return torch.cat(items)
    return torch.stack(items).mean() if items[0].is_floating_point() else items[0]
