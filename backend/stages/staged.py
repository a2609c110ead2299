"""A model cut into stages, as the rest of the backend takes it: a program, and a module for each of its
stages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from stagecut.backend.stages.emit import emit
from stagecut.backend.stages.modules import Stage, switching
from stagecut.backend.stages.names import Named
from stagecut.backend.stages.run import release_plan, run_stages
from stagecut.backend.stages.sampled import Samples
from stagecut.backend.stages.state import refuse_meta
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import InputError
from stagecut.ir.graph import Program
from stagecut.ir.roles import Budget, Roles
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.call import CallSpec, check_inputs
from stagecut.ir.run.held import Held
from stagecut.ir.run.remembered import refuse_changed
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text


class Staged(Named):
    """A model cut into stages. Calling it runs the stages one after the other and returns the flat outputs.

    program: the linked IR; `ir()` is its text. bindings: the real objects behind its names. The stages hold
    the model's own tensors, and the pipe is differentiable end to end. The modules and tensors of all stages
    together are under the model's names.
    """

    def __init__(self, program: Program, bindings: Bindings) -> None:
        super().__init__()
        verify(program)
        self.program = program
        self.stages: list[Stage] = emit(program, bindings)
        self._call_spec: CallSpec | None = bindings.call
        self._name(self.stages, bindings.names())
        self._plan = release_plan(program)
        self.notes: tuple[str, ...] = tuple(bindings.notes)
        self._model: Callable[[], nn.Module | None] | None = None
        self._attributes_read = tuple(bindings.attributes_read)
        self._held: Held | None = None
        self._sizes: dict[str, int] = {}
        self._built: Samples = {}
        """Numbers of the model's tensors at the cut; none of a model that was not cut here."""
        self.traced_under: dict[str, torch.dtype] = {}
        """Device type -> the dtype of the autocast that stood around the trace."""
        self.plan: Any = None
        self.training = bindings.training

    has_loss_and_backward = False
    """torch's option to put a backward into the graph; here autograd makes the backward."""

    def train(self, mode: bool = True) -> Self:
        """The stages are in train mode, or with False, as after `eval()`, in eval mode: they do what the
        model does in that mode.

        `model.train()` and `model.eval()` do not reach them. Raises ModeError, and switches nothing, where
        the stages hold one mode only.
        """
        with switching(self.stages, mode):
            super().train(mode)
        return self

    def refuse_changed_model(self) -> None:
        """Returns when the model has the plain attributes that its trace read, and the parameters that the
        stages hold, or is gone. Raises ChangedError otherwise.
        """
        refuse_changed(self._attributes_read)
        model = self._model() if self._model is not None else None
        if model is not None and self._held is not None:
            self._held.refuse_replaced(model, self._parameter_now)

    def _parameter_now(self, name: str) -> nn.Parameter | None:
        """The parameter that the stages have under a name of the model."""
        try:
            return self.get_parameter(name)
        except AttributeError:
            return None

    def keep_as_cut(self) -> Self:
        """The stages compute what the model computed at the cut, and calls no longer compare its attributes
        and parameters: for two pipes of one model, with an adapter and without. Tensors are the model's own
        still, so what merges an adapter into them changes the stages.
        """
        self._attributes_read, self._held = (), None
        return self

    @property
    def num_stages(self) -> int:
        """The number of stages."""
        return len(self.stages)

    def get_stage_module(self, stage_idx: int) -> Stage:
        """The module of stage `stage_idx`. Raises ValueError when there is no such stage."""
        if not 0 <= stage_idx < self.num_stages:
            raise ValueError(
                f"Invalid stage index {stage_idx}! There are {self.num_stages} stages."
            )
        return self.stages[stage_idx]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Runs all stages in order on the model's own arguments; returns the flat tuple of output leaves.
        What forward changed in the objects that it was given is changed in the arguments.

        Raises StagecutError where a stage is on the meta device and the arguments are not.
        """
        spec = self._call_spec
        results = self.flat_outputs(args, kwargs)
        if spec is None or not spec.changes:
            return results
        spec.unflatten(results, args, kwargs)
        return results[: spec.result_leaves]

    def flat_outputs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """The flat outputs of the program for a call of the model with `args` and `kwargs`: the leaves of its
        result, then what it leaves in the objects that it is given, which stay as they are.
        """
        self.refuse_changed_model()
        flat = self.flatten(args, kwargs)
        try:
            results = run_stages(self.program, self.stages, self._plan, flat)
        except RuntimeError:
            self._refuse_meta(flat)
            raise
        if any(map(_is_meta, results)):  # not every op refuses a mixture of devices
            self._refuse_meta(flat)
        return results

    def _refuse_meta(self, flat: Sequence[Any]) -> None:
        """Returns when all stages are real, or the inputs are on meta as well; otherwise raises
        StagecutError.
        """
        if not any(map(_is_meta, flat)):
            for stage in self.stages:
                refuse_meta(self.program, stage)

    def joint_graph(
        self,
        function: Callable[..., tuple[torch.Tensor, ...]],
        arguments: Sequence[torch.Tensor],
    ) -> Any:
        """A function of these arguments and its gradients, traced together, as `roles` takes it. Raises
        CaptureError.

        The frontend traces, so the public class overrides this.
        """
        raise NotImplementedError

    def roles(
        self,
        traced: Any,
        names: Sequence[str],
        weights: Collection[int],
        same: Mapping[int, int],
        resident: Collection[int],
        recompute: bool | Budget = False,
    ) -> tuple[Roles, Bindings]:
        """The roles of a traced function whose arguments have these names, and the constants that the roles
        read. `weights` are the places of the arguments whose gradients may come last. `same`: the place of a
        result -> that of the argument which it is a copy of, and which the forward returns instead.
        `resident`: the places of the arguments that lie in memory whatever is saved. With `recompute`, the
        backward computes ops again, so that less is saved (passes/roles.py).

        The public class overrides this.
        """
        raise NotImplementedError

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The program's flat inputs for a call of the model with `args` and `kwargs`. Raises InputError when
        the call does not fit the trace.
        """
        spec = self._call_spec
        flat = list(args) if spec is None else spec.flatten(args, dict(kwargs))
        if len(flat) != len(self.program.inputs):
            raise InputError(
                f"{len(flat)} inputs given, the program takes {len(self.program.inputs)}"
            )
        ranges = None if spec is None else spec.ranges
        check_inputs(self.program.inputs, flat, ranges)
        return flat

    def __getstate__(self) -> dict[str, Any]:
        """The program is pickled as text: its ops and values point at each other, deeper than a copy can
        recurse.
        """
        state = self.__dict__.copy()
        del state["_plan"], state["_model"], state["_attributes_read"], state["_held"]
        return state | {"program": text(self.program)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        program = parse(state["program"])
        super().__setstate__(
            state
            | {
                "program": program,
                "_plan": release_plan(program),
                "_model": None,
                "_attributes_read": (),
                "_held": None,
            }
        )

    def ir(self) -> str:
        """The program as text, with the ops of each block. `dump-ir` prints blocks that do the same as calls
        of one function, and with `--unfold` this text. `stagecut.parse` reads both.
        """
        return text(self.program)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.program.name}: {self.num_stages} stages, "
            f"{'train' if self.training else 'eval'} mode)"
        )


def _is_meta(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_meta
