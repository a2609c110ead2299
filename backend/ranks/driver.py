"""`Driver` runs a schedule of stages on torch.distributed, one process a rank, and trains a model with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
)
from torch.optim import Optimizer

from stagecut.backend.ranks.agree import Calls, agree_on_program, agree_on_values
from stagecut.backend.ranks.batch import LABELS, Call, ChunkSpecs, MicroBatches
from stagecut.backend.ranks.buffers import Buffers
from stagecut.backend.ranks.built import built_otherwise, notes_on_mixture
from stagecut.backend.ranks.data import Data
from stagecut.backend.ranks.draws import Draws, draws
from stagecut.backend.ranks.faults import Faults, Report, failure_of_loss
from stagecut.backend.ranks.gradients import Gradients
from stagecut.backend.ranks.kinds import (
    device_of,
    norm_order,
    refuse_wrong_kinds,
    refuse_wrong_options,
)
from stagecut.backend.ranks.lent import Lent, StaleError, leaves_of
from stagecut.backend.ranks.losses import (
    Losses,
    StepLosses,
    add_corrected,
    carriers,
    no_loss,
    place_of_loss,
    put_aside,
    refuse_no_gradient,
    takes_no_target,
)
from stagecut.backend.ranks.noted import follows_mode, notes_of_step, warn
from stagecut.backend.ranks.placement import (
    accepted_by,
    own_device,
    part_of_loss,
    placement,
    refuse_no_group,
    schedule_class,
)
from stagecut.backend.ranks.posts import ONE_STREAM, shares_a_stream
from stagecut.backend.ranks.precision import Dtypes, Precision
from stagecut.backend.ranks.recorded import Step, StepGraphs, refuse_drawing
from stagecut.backend.ranks.stage import BuiltStage, Group, as_tuple, make_stage
from stagecut.backend.ranks.told import Told, tell
from stagecut.backend.ranks.trained import (
    changed_here,
    follow,
    refuse_other_parameters,
)
from stagecut.backend.ranks.wire import Sizes
from stagecut.backend.ranks.wrapped import Wrap, trained, wrapped
from stagecut.backend.schedules import (
    Orders,
    flights_of,
    order_name,
    reorder,
    torch_schedule,
)
from stagecut.backend.stages.backwards import refuse_backward
from stagecut.backend.stages.crossing import refuse_feedback
from stagecut.backend.stages.graphs import Graphs
from stagecut.backend.stages.roles import RoleCode
from stagecut.backend.stages.saving import Saving
from stagecut.backend.stages.staged import Staged
from stagecut.backend.tables import table
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import InputError, StagecutError
from stagecut.ir.keywords import near_names_in
from stagecut.ir.run.shown import shown_value
from stagecut.ir.types import value_bytes


@near_names_in
class Driver:
    """Runs a pipe on the ranks of a group by one of torch's schedules.

    Every rank makes one with the same pipe, and calls `step` with the same arguments: those of the model.
    Rank r holds stages r, r + ranks, ..., or for V schedules r and its mirror image.

    Arguments
    ---------
    pipe: the pipe. Its stages are moved to `device` when they are first needed; those on meta must be real by
        then.
    schedule: the name of a schedule, such as "GPipe", "1F1B", "Interleaved1F1B" or "ZBVZeroBubble".
    n_microbatches: into how many micro-batches a batch is divided.
    loss_fn: loss_fn(output, target, **loss_kwargs) returns a loss, or (loss, metrics). Without one, there is
        no backward: a target is refused, and a step that could train is noted.
    group: the ranks; None for all of them.
    device: where the stages of this rank run; by default its GPU with nccl, else the CPU.
    scale_grads: whether the loss of the batch is the mean over its micro-batches; with False it is the sum.
    return_outputs: whether `step` and `eval` return the outputs. If not, the outputs of a micro-batch are
        released after its loss.
    wrap: wrap(module, index) is called once for each stage of this rank, when its module is on its device.
        The module that it returns runs in the place of the stage's own: FSDP, DDP, activation checkpointing
        and torch.compile go there.
    normalize_by: the name of a metric, such as "tokens". With it losses are sums, and the loss of the batch
        is the sum of all divided by the sum of that metric.
    share_losses: whether every rank gets losses and metrics, or only the last.
    seed: with it, micro-batch m of call k draws the random numbers that the uncut model draws after
        `torch.manual_seed(seed + k * n_microbatches + m)`. None: each stage draws its own, which depend on
        torch's generator.
    eval_mode: whether `eval` runs in eval mode; None for a pipe that is trained.
    compare_steps: in how many calls the ranks compare the contents of their arguments; they compare sizes in
        every call.
    data_on: the ranks that are given the arguments: "all", "first" for the rank of the first stage, or "ends"
        for that one with the inputs and the rank of the last stage with target and `loss_kwargs`. The others
        call without.
    backward: "autograd", or "graph": each stage is three functions, its forward, the gradients of its inputs
        and those of its weights, of which a schedule may delay the last (docs/DISTRIBUTED.md). A stage that
        cannot be so has a note that says why.
    compile: whether torch.compile makes each of the three functions.
    recompute: whether the backward computes light ops again, so that less is saved.
    activation_budget: how much is saved. A float is what torch's `activation_memory_budget` is, a part of the
        way from the least that can be saved, 0.0, to all, 1.0. An int, which torch has not, is the bytes of
        this rank for what its stages save, with all micro-batches of the schedule in flight.
    cuda_graphs: whether a step of a rank is recorded with its messages in a CUDA graph, and replayed when a
        step of the same sizes comes again. Its gradients, where there were none before, lie in memory that
        the next step writes. Python code in loss_fn runs only while it is recorded. Stages that draw random
        numbers are refused.
    args_chunk_spec, kwargs_chunk_spec, target_chunk_spec, output_merge_spec: along which dims a batch is
        divided and outputs are joined, as for torch's schedules, where the program does not know it.
    schedule_kwargs: for torch's schedule, such as {"defer_pp_recv": True}.
    order: the steps of every rank in the order in which it does them, in place of the schedule's own, under
        one that splits backwards: `pipe.plan.order`, for as many micro-batches as the plan's setting has.

    Raises InputError for arguments that do not fit each other, the group or the pipe, and StagecutError where
    the ranks have different pipes.
    """

    _failure: Report | None = None
    _loss_error: Exception | None = None
    """The failure of the loss function in the present call, and its error."""

    def __init__(
        self,
        pipe: Staged,
        schedule: str = "1F1B",
        n_microbatches: int = 1,
        loss_fn: Callable[..., Any] | None = None,
        group: Group = None,
        device: torch.device | str | None = None,
        scale_grads: bool = True,
        return_outputs: bool = True,
        wrap: Wrap = None,
        normalize_by: str | None = None,
        share_losses: bool = True,
        seed: int | None = None,
        eval_mode: bool | None = None,
        compare_steps: int = 2,
        data_on: str = "all",
        *,
        backward: str = "autograd",
        compile: bool = False,
        recompute: bool = False,
        activation_budget: int | float | None = None,
        cuda_graphs: bool = False,
        args_chunk_spec: Sequence[Any] | None = None,
        kwargs_chunk_spec: Mapping[str, Any] | None = None,
        target_chunk_spec: Any = None,
        output_merge_spec: Any = None,
        schedule_kwargs: Mapping[str, Any] | None = None,
        order: Orders | None = None,
    ) -> None:
        refuse_wrong_options(
            pipe,
            loss_fn,
            schedule=schedule,
            group=group,
            wrap=wrap,
            normalize_by=normalize_by,
            seed=seed,
            compare_steps=compare_steps,
            args_chunk_spec=args_chunk_spec,
            kwargs_chunk_spec=kwargs_chunk_spec,
            schedule_kwargs=schedule_kwargs,
            order=order,
        )
        refuse_no_group(group)
        self.pipe = pipe
        self.n_microbatches = n_microbatches
        self.loss_fn = loss_fn
        self.group = group
        self.schedule_class = schedule_class(schedule)
        self._schedule_kwargs = accepted_by(self.schedule_class, schedule_kwargs or {})
        self.device = device_of(device) if device is not None else own_device(group)
        self._scale = part_of_loss(n_microbatches, scale_grads)
        ranks = dist.get_world_size(group)
        self.placement = placement(pipe.num_stages, ranks, self.schedule_class)
        self.stage_indices = tuple(
            i for i, home in enumerate(self.placement) if home == dist.get_rank(group)
        )
        self._order = order
        settings = {
            "schedule": schedule,
            "n_microbatches": n_microbatches,
            "loss_fn": "given" if loss_fn is not None else "None",
            "order": order_name(
                order, self.schedule_class, self.placement, n_microbatches
            ),
        }
        agree_on_program(pipe.program, settings, group)
        if loss_fn is not None:  # others may only hold stages, for a checkpoint
            torch_schedule(schedule, pipe.num_stages, ranks, n_microbatches)
        agree_on_values(pipe, self.placement, group)
        self._built_otherwise = built_otherwise(pipe, group)
        self._wrap = wrap
        self._returns = return_outputs
        self._share = share_losses
        self._eval_mode = eval_mode
        self._normalize_by = normalize_by
        self._looked = set[str]()
        self._read_by_loss: list[torch.Tensor] = []
        self.draws = Draws(pipe.program, self.device, n_microbatches, seed)
        self._lent = Lent(pipe, self.placement, group, self.device)
        self._data = Data(pipe, self.placement, group, self.device, data_on)
        self.faults = Faults(group, self.placement)
        # moved data is the same everywhere, and without contents where nobody reads it
        compared = compare_steps if data_on == "all" else 0
        self.calls = Calls(group, compared, self.faults)
        self._buffers = {
            i: Buffers(pipe.stages[i], pipe.program.stages[i])
            for i in self.stage_indices
        }
        self._losses: Losses | None = None
        if loss_fn is not None:
            self._losses = Losses(loss_fn, n_microbatches, self._scale, normalize_by)
            trained.add(pipe)
        self._batch = MicroBatches(
            pipe,
            n_microbatches,
            self.device,
            group,
            ChunkSpecs(
                args_chunk_spec, kwargs_chunk_spec, target_chunk_spec, output_merge_spec
            ),
        )
        refuse_backward(backward, compile, recompute, activation_budget)
        self._graphs: dict[int, Graphs] = {}
        if backward == "graph":
            code = RoleCode(compile)
            self._graphs = {
                i: Graphs(pipe, i, code, recompute) for i in self.stage_indices
            }
        self._saving = Saving(
            pipe,
            self._graphs,
            activation_budget,
            cache(
                lambda: flights_of(
                    schedule, pipe.num_stages, ranks, n_microbatches, order
                )
            ),
        )
        self._step_graphs = self._graphs_of_steps() if cuda_graphs else None
        self._notes: dict[str, None] = {}
        self._schedules: dict[Any, tuple[Any, list[BuiltStage]]] = {}
        self._gradients = Gradients(
            pipe, self.placement, group, self.device, self.faults, self.calls
        )
        self._precision = Precision(
            pipe, self.placement, group, self.device, self.faults
        )

    def _graphs_of_steps(self) -> StepGraphs:
        if self.device.type != "cuda":
            raise InputError(
                f"cuda_graphs=True, and the stages run on {self.device}",
                hint="a device of CUDA, or leave cuda_graphs=True away",
            )
        refuse_drawing(draws(self.pipe.program))
        return StepGraphs(self.device)

    def drop_recordings(self) -> None:
        """The steps that `cuda_graphs=True` has recorded are gone, and their memory with them, but for
        gradients. NCCL waits for that in `destroy_process_group`. A further step runs as it is, later ones
        are recorded again.
        """
        if self._step_graphs is not None:
            self._step_graphs.drop()

    @property
    def is_last(self) -> bool:
        """True on the rank that has the last stage, and so the outputs and the losses."""
        return self.pipe.num_stages - 1 in self.stage_indices

    @property
    def notes(self) -> tuple[str, ...]:
        """The outputs of the calls so far that could not be put together, and why; the stages that autograd
        runs in the place of graphs, and why; what the steps so far may not have been meant to do, such as to
        train nothing; whether ranks built the model with other values; whether messages share a stream in
        vain.
        """
        stages = [
            f"stage {index} runs by autograd: {graphs.note}"
            for index, graphs in self._graphs.items()
            if graphs.note
        ]
        return *self._batch.notes, *stages, *self._notes

    def __repr__(self) -> str:
        """The schedule, the mode of the pipe, which rank has which stage, and the sizes of a micro-batch."""
        return described(self)

    @cached_property
    def _changes_by_mode(self) -> bool:
        return follows_mode(self.pipe.program)

    @cached_property
    def modules(self) -> dict[int, torch.nn.Module]:
        """This rank's stages by index, on its device, with the wrappers of `wrap`. Raises StagecutError while
        one is on meta.
        """
        return {
            i: wrapped(self.pipe, i, self.device, self._wrap)
            for i in self.stage_indices
        }

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters this rank holds, each once, as they are in `modules`."""
        stages = [self.pipe.stages[index] for index in self.modules]
        held = (p for stage in stages for p in stage.parameters())
        return list(dict.fromkeys(held))

    def step(
        self,
        *args: Any,
        target: Any = None,
        loss_kwargs: Mapping[str, Any] | None = None,
        arg_mbs: Sequence[Any] | None = None,
        kwarg_mbs: Sequence[Any] | None = None,
        target_mbs: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, StepLosses]:
        """One step on a whole batch: the model's own arguments, the same on every rank. Or on micro-batches
        as they are, of any number of samples: `arg_mbs`, `kwarg_mbs`, `target_mbs`.

        Returns the outputs in the model's structure on the last stage's rank, None elsewhere, and the losses
        of the micro-batches with the loss and the metrics of the batch. With a loss function, gradients of
        the loss of the batch are accumulated. `loss_kwargs` are divided as `target` is, and each micro-batch
        of `arg_mbs` is given all of them.

        Raises InputError when the arguments do not fit, and RankError on every rank when a rank fails or dies
        (backend/ranks/faults.py).
        """
        labels = target, target_mbs, loss_kwargs
        return self._run(Call(args, kwargs, arg_mbs, kwarg_mbs, *labels), "step")

    def eval(
        self,
        *args: Any,
        target: Any = None,
        loss_kwargs: Mapping[str, Any] | None = None,
        arg_mbs: Sequence[Any] | None = None,
        kwarg_mbs: Sequence[Any] | None = None,
        target_mbs: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, StepLosses]:
        """The outputs and losses, as of `step` with the same arguments, by a forward only: there are no
        gradients. Without a target, a loss function that takes one is not called.

        A pipe that is trained, by this driver or another, is in eval mode meanwhile, and as it was before
        afterwards. Otherwise the mode stays as `pipe.eval()` and `pipe.train()` set it.
        """
        with torch.no_grad(), self._evaluating():
            labels = target, target_mbs, loss_kwargs
            return self._run(Call(args, kwargs, arg_mbs, kwarg_mbs, *labels), "eval")

    def train(self, mode: bool = True) -> Driver:
        """The pipe is in train mode, or with False in eval mode, as after `pipe.train(mode)`. Each rank calls
        it. `step` runs in the mode that the pipe is in.
        """
        self.pipe.train(mode)
        for module in self.modules.values():
            module.train(mode)
        return self

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The pipe is in eval mode inside, unless it is not to be switched."""
        wanted = self._eval_mode
        if wanted is None:
            wanted = self.pipe in trained
        modes: dict[torch.nn.Module, bool] = {}
        for module in (self.pipe, *self.pipe.stages, *self.modules.values()):
            modes |= {part: part.training for part in module.modules()}
        switches = wanted and any(modes.values())
        with self.faults.alike():  # also where only other ranks switch
            if switches:
                self.train(False)
        try:
            yield
        finally:
            for part, mode in modes.items() if switches else ():
                part.training = mode

    def _run(self, call: Call, how: str) -> tuple[Any, StepLosses]:
        if self._data.moves:
            self.calls.announce(f"driver.{how}")
        with self.faults.together():
            call = self._data.moved(call, self.n_microbatches)
        losses = self._agreed(call, how)
        self._note(how, losses is not None)
        with self.faults.alike():
            if any(entry.share == "feedback" for entry in self.pipe.program.state):
                # the pipe may have been switched since the stages were made
                refuse_feedback(self.pipe.program, self.pipe.training)
            cast = self._precision.agreed.change is not None
            sizes = self._batch.of_call(call, cast)
            if losses is not None:
                losses.begin(*self._batch.labels(call))
        dtypes = self._precision.dtypes(
            lambda index, dtypes: self._built(index, sizes[0], dtypes)
        )
        with self.faults.alike():
            schedule, stages = self._prepared(sizes, dtypes)
            if self._saving.is_open and how == "step":
                self._saving.share(sizes[0], self.device, dtypes)
        self.draws.begin()
        for stage in stages:
            stage.microbatches = self._batch.inputs
            stage.results = {} if self._returns else None
            stage.buffers = self._buffers[stage.stage_index]
            stage.buffers.begin(self.n_microbatches, not self.pipe.training)
            if stage.graphs is not None:
                stage.graphs.begin(stage.submod)
        with self.faults.together(agreed=(StaleError,)):
            if how == "step" and losses is not None:
                for stage in stages:
                    stage.warm_up()
            step_losses = self._microbatches(schedule, stages, how, losses)
        if not self.is_last:
            return None, step_losses
        results = next(s for s in stages if s.is_last).results
        if results is None:
            return None, step_losses
        return self._batch.joined(results), step_losses

    def _note(self, how: str, has_losses: bool) -> None:
        """`notes` has what is to be noted about a call that begins, and Python has warned of it once."""
        others, self._built_otherwise = self._built_otherwise, {}
        notes: list[str] = []
        if others:  # in the first call, since weights may be loaded until then
            notes += notes_on_mixture(self.pipe, self.stage_indices, others)
        if how == "step":
            notes += notes_of_step(self.pipe, has_losses, lambda: self._changes_by_mode)
        for note in notes:
            if note not in self._notes:
                self._notes[note] = None
                warn(note)

    def _agreed(self, call: Call, how: str) -> Losses | None:
        """The object that computes the losses of a call, None for a call without losses. The ranks agree on
        the arguments, and the program says which parameters are trained.
        """
        with self.faults.together(agreed=(StagecutError,)):
            with self.faults.alike():
                self.pipe.refuse_changed_model()
                modules = self.modules
            needs_grad = how == "step" and self._losses is not None
            changed = (
                changed_here(self.pipe, self.stage_indices),
                self._precision.changed_here(),
                needs_grad and not torch.is_grad_enabled(),
            )
            agreed = self.calls.agree(how, self.pipe.training, vars(call), changed)
            trained_changed, precision_changed, without_grad = agreed.changed
            if without_grad:
                raise _no_grad()
            if trained_changed:
                self._follow_trained()
            with self.faults.alike():
                refuse_wrong_kinds(loss_kwargs=call.loss_kwargs)
        if precision_changed:
            self._precision.agree(modules)
        if self._losses is None:
            _refuse_labels(how, agreed.has)
            return None
        with_target = agreed.has["target"] | agreed.has["target_mbs"]
        if self.placement[-1] in with_target or takes_no_target(
            self._losses.loss_fn, [*(call.loss_kwargs or ())]
        ):
            return self._losses
        if how == "eval":
            return None
        raise _no_target(self.placement[-1], self._batch.unknown(call))

    def _follow_trained(self) -> None:
        follow(self.pipe, self.modules, self.group)
        self._schedules.clear()
        self._saving.reopen()

    def _microbatches(
        self,
        schedule: Any,
        stages: Sequence[BuiltStage],
        how: str,
        losses: Losses | None,
    ) -> StepLosses:
        """Runs the schedule. The gradients are those of the batch."""
        backward = how == "step" and losses is not None
        self._lent.fetch()
        if backward:
            self._gradients.tied.accumulate()
        aside = put_aside(self.parameters()) if backward and self._normalize_by else {}
        numbers = torch.arange(self.n_microbatches) if self.is_last else None
        self._call_losses = losses
        self._failure = None
        self._silent = self._is_silent(how)

        def run() -> None:
            self._read_by_loss = []
            getattr(schedule, how)(
                target=numbers if self._losses is not None else None,
                losses=[] if numbers is not None and self._losses is not None else None,
                return_outputs=False,
            )
            for stage in stages:
                stage.settle()

        if backward and losses is not None and self._step_graphs is not None:
            self._lent.refuse_recorded()
            self._step_graphs.run(
                Step(run, stages, losses, self.parameters(), self._read_by_loss)
            )
        else:
            run()
        told = self._last_told(how, losses)
        if backward and self._normalize_by:
            add_corrected(self.parameters(), aside, told.factor)
        if told.failure is not None:
            error, self._loss_error = self._loss_error, None
            raise self.faults.failed_loss(told.failure) from error
        self._lent.agree(told.read)
        if backward:
            self._lent.give(told.factor)
        return told.losses

    def _last_told(self, how: str, losses: Losses | None) -> Told:
        """The losses, the factor that the gradients lack, and the weights that the loss function read, as the
        last rank tells them.
        """
        if losses is None:
            return Told()
        own = Told(failure=self._failure)
        if self._failure is None:
            self._looked.add(how)
            if self.is_last:
                read = tuple(self._lent.read)
                own = Told(losses.result(), losses.correction, read)
        if self._silent:
            self._lent.refuse_late()
            return own
        return tell(own, self._share, self.placement[-1], self.group, self.device)

    def _is_silent(self, how: str) -> bool:
        """True for a call after which the last rank tells the others nothing."""
        needed = self._share or self._normalize_by is not None
        return not needed and how in self._looked

    def _built(self, index: int, sizes: Sizes, dtypes: Dtypes) -> BuiltStage:
        """A stage for torch's schedules, with the module that `wrap` made of it."""
        stage = make_stage(
            self.pipe, index, self.device, self.group, sizes, True, dtypes, self.draws
        )
        stage.submod = self.modules[index]
        stage.microbatches = self._batch.inputs
        stage.graphs = self._graphs.get(index)
        return stage

    def _prepared(
        self, sizes: list[Sizes], dtypes: Dtypes
    ) -> tuple[Any, list[BuiltStage]]:
        """The schedule and its stages for these dtypes, made at their first use. They receive into buffers of
        these sizes, one for each micro-batch.
        """
        key = tuple(dtypes.values())
        if key not in self._schedules:
            stages = [self._built(i, sizes[0], dtypes) for i in self.stage_indices]
            single = issubclass(self.schedule_class, PipelineScheduleSingle)
            loss = self._loss if self.loss_fn is not None else None
            try:
                schedule = self.schedule_class(
                    stages[0] if single else stages,
                    self.n_microbatches,
                    loss_fn=loss,
                    scale_grads=False,
                    **self._schedule_kwargs,
                )
            except ValueError as error:
                raise StagecutError(
                    f"{self.schedule_class.__name__} does not run so: {error}",
                    where=f"{self.n_microbatches} micro-batches, {self.pipe.num_stages} stages",
                    hint="another number of micro-batches, or another schedule",
                ) from None
            if self._order is not None:
                reorder(schedule, self._order)
            # a rank with one neighbour has one stream for its messages in any case
            several = max(self.placement) > 1
            if isinstance(schedule, _PipelineScheduleRuntime) and several:
                for stage in stages:
                    stage.begin_alone()
                if shares_a_stream(self.group, self.device):
                    self._notes[ONE_STREAM] = None
            self._schedules[key] = schedule, stages
        for stage in self._schedules[key][1]:
            stage.resize(sizes)
        return self._schedules[key]

    def _loss(self, output: Any, number: torch.Tensor) -> torch.Tensor:
        """The user's loss of one micro-batch; torch passes its number for a target. Where the loss function
        has failed, no loss: the other ranks wait for the backward before they can be told.
        """
        packed = as_tuple(output)
        if self._call_losses is None:
            return torch.zeros(())
        if self._failure is None:
            result = self._batch.structured(packed, int(number))
            try:
                return self._loss_of(self._call_losses, result, packed, int(number))
            except Exception as error:
                raise_ours(error)
                self._failure = self._told_later(error, result, packed, int(number))
                if self._failure is None:
                    raise
                self._loss_error = error
        return no_loss(packed)

    def _loss_of(
        self, losses: Losses, result: Any, packed: Sequence[Any], index: int
    ) -> torch.Tensor:
        grad = torch.is_grad_enabled()
        look = grad or not (index or "eval" in self._looked)
        with torch.set_grad_enabled(look):
            loss = losses.of(result, index)
        if look:
            self._look(leaves_of(loss, packed))
        if grad:
            refuse_no_gradient(
                loss, index, losses.loss_fn, packed, self._trains_something
            )
            return self._gradients.scaled(loss)
        return loss

    def _trains_something(self) -> bool:
        state = self.pipe.program.state
        return any(entry.kind == "param" and entry.requires_grad for entry in state)

    def _told_later(
        self, error: Exception, result: Any, packed: Sequence[Any], index: int
    ) -> Report | None:
        """A report of an error that the loss function raised, for when the schedule is through; None where it
        cannot go on so far.
        """
        grad = torch.is_grad_enabled()
        if self._silent or self._step_graphs is not None:
            return None
        if grad and self._trains_something() and not carriers(packed):
            return None  # no stage would begin a backward that others wait for
        assert self._call_losses is not None
        given = f"{shown_value(result)} and {self._batch.shown_labels(self._call_losses.given, index)}"
        how = "step" if grad else "eval"
        place = place_of_loss(self._call_losses.loss_fn)
        return failure_of_loss(error, self.pipe.num_stages - 1, place, given, how)

    def _look(self, leaves: Sequence[torch.Tensor]) -> None:
        """Notes what the loss function reads besides the outputs."""
        self._lent.look(leaves)
        self._read_by_loss += leaves
        if leaves:
            for _, stages in self._schedules.values():
                for stage in stages:
                    stage.whole |= stage.is_last

    def sync_shared_gradients(self) -> None:
        """Every replica of a tied parameter has the sum of the gradients of all replicas. Each rank of the
        pipeline calls it.
        """
        self._gradients.tied.sum("driver.sync_shared_gradients")

    def attach(self, optimizer: Optimizer | None) -> None:
        """Before every update by `optimizer`, tied gradients are summed, and a GradScaler decides as on the
        other ranks. Does nothing for None, the optimizer of a rank that trains nothing.

        Raises InputError for an optimizer that has none of `parameters()`, or some of other ranks' stages.
        """
        if optimizer is None:
            return
        refuse_wrong_kinds(optimizer=optimizer)
        refuse_other_parameters(
            optimizer, self.pipe, self.stage_indices, self.parameters()
        )
        self._gradients.attach(optimizer)

    def attach_scaler(self, scaler: GradScaler) -> None:
        """The backward of every step starts from the loss that `scaler` scales; `step` returns losses that
        are not scaled. Every rank attaches one of its own.
        """
        refuse_wrong_kinds(scaler=scaler)
        self._gradients.attach_scaler(scaler)

    def clip_grad_value_(self, clip_value: float, foreach: bool | None = None) -> None:
        """No element of a gradient is below -`clip_value` or above `clip_value`. Tied gradients are summed
        first. Every rank calls it.

        clip_value, foreach: as for `torch.nn.utils.clip_grad_value_`.
        """
        refuse_wrong_kinds(clip_value=clip_value)
        self._gradients.clip_value(clip_value, foreach)

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        """The norm of all gradients over all ranks, which are scaled to `max_norm` where it is larger. Tied
        gradients are summed first and counted once. Every rank calls it and gets the same norm.

        max_norm, norm_type, error_if_nonfinite, foreach: as for `torch.nn.utils.clip_grad_norm_`.

        Raises NonFiniteError on every rank, with `error_if_nonfinite`, when the norm is not finite.
        """
        refuse_wrong_kinds(max_norm=max_norm)
        order = norm_order(norm_type)
        return self._gradients.clip_norm(max_norm, order, error_if_nonfinite, foreach)


def _refuse_labels(how: str, has: Mapping[str, frozenset[int]]) -> None:
    """Returns when no rank was given anything for a loss function, as there is none. `has`: argument -> the
    ranks that were given it.
    """
    for name in LABELS:
        if not has[name]:
            continue
        raise InputError(
            f"{how} was called with {name}=, and no loss_fn takes it: without one there are no gradients",
            hint=f"Driver(..., loss_fn=...), or driver.eval(...) without {name}= for a forward alone",
        )


def _no_grad() -> InputError:
    return InputError(
        "driver.step makes gradients, and a rank calls it where torch makes none, as in torch.no_grad() or "
        "torch.inference_mode()",
        hint="driver.eval(...) for a forward alone, or driver.step(...) outside of it",
    )


def _no_target(rank: int, unknown: Sequence[str]) -> InputError:
    """The error for a step without a target; `unknown` are arguments that the model does not have, one of
    which may be meant for it. `rank` has the last stage.
    """
    what = "loss_fn takes a target, and step was called without one"
    hint = "driver.step(..., target=...)"
    if unknown:
        plural = "s" if unknown[1:] else ""
        names = ", ".join(f"'{name}'" for name in unknown)
        what += f"; the model's forward has no argument{plural} {names}"
        hint = f"driver.step(..., target=...) in the place of {'= or '.join(unknown)}="
    return InputError(what, where=f"rank {rank}, which has the last stage", hint=hint)


def described(driver: Driver) -> str:
    """A driver as text: schedule, placement, mode, sizes."""
    program = driver.pipe.program
    ranks = driver.faults.ranks
    rank = driver.faults.rank
    mode = "train" if driver.pipe.training else "eval"
    lines = [
        f"Driver of {program.name}: {driver.schedule_class.__name__}, {driver.pipe.num_stages} stages on "
        f"{ranks} ranks, {driver.n_microbatches} micro-batches, {mode} mode, this is rank {rank}"
    ]
    rows = [("  stage", "rank", "tensors", "bytes", "")]
    for index, home in enumerate(driver.placement):
        tensors = {
            entry: entry.type
            for entry in program.stages[index].state
            if entry.kind == "param"
        }
        nbytes = sum(value_bytes(tensor_type) or 0 for tensor_type in tensors.values())
        mark = "here" if home == rank else ""
        count = f"{len(tensors):,}"
        rows.append((f"  {index}", str(home), count, f"{nbytes:,}", mark))
    lines += table(rows).splitlines()
    if driver._order is not None:
        lines.append("  steps in the order that was given")
    lines += driver._saving.lines()
    lines += [f"  input {value.hint} : {value.type}" for value in program.inputs]
    calls: dict[str, None] = {}
    for sizes in driver._batch.sizes:
        numbers = [f"{name}={number}" for name, number in sizes.items()]
        calls[", ".join(numbers)] = None
    lines += [f"  ran with {sizes}" for sizes in calls if sizes]
    return "\n".join(lines)
