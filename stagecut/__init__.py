"""stagecut cuts PyTorch models into pipeline stages.

    pipe = stagecut.pipeline(model, (x,), stages=2)      # Pipe: print it, call it, pipe.get_stage_module(0)
    driver = stagecut.Driver(pipe, "1F1B", 8, loss_fn)   # trains it on the ranks of a group
    generator = stagecut.Generator(model, stages=2)      # generates with a decoder of transformers

Cutting: pipeline, from_pretrained, pipe_split, SplitPoint, Balanced, AtModules, Markers. Costs: Setting,
Device, Plan, Timeline, record. Running: Driver, StepLosses, build_stage, Generator. Files: load, load_stage,
checkpoint. Text and pictures: text, parse, to_dot, to_svg, to_html. Every error is a StagecutError.

Names load on first use, so that `import stagecut` costs nothing until a model is compiled.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stagecut.ir.version import VERSION

if TYPE_CHECKING:
    from torch.distributed.pipelining import (
        PipelineStage,
        Schedule1F1B,
        ScheduleDualPipeV,
        ScheduleGPipe,
        ScheduleInterleaved1F1B,
        ScheduleInterleavedZeroBubble,
        ScheduleLoopedBFS,
        ScheduleZBVZeroBubble,
    )

    from stagecut.backend.costs.balance import (
        AtModules,
        Balanced,
        Markers,
    )
    from stagecut.backend.costs.ops import Device
    from stagecut.backend.costs.plan import Plan
    from stagecut.backend.costs.record import record
    from stagecut.backend.costs.setting import Setting
    from stagecut.backend.costs.timeline import Timeline
    from stagecut.backend.files import checkpoint
    from stagecut.backend.files.checkpoint import CheckpointError
    from stagecut.backend.files.initial import MaterializeError
    from stagecut.backend.files.saved import load_stage
    from stagecut.backend.files.untrusted import SavedError
    from stagecut.backend.page.page import to_html
    from stagecut.backend.pictures.dot import to_dot, to_svg
    from stagecut.backend.ranks.driver import Driver
    from stagecut.backend.ranks.faults import RankError
    from stagecut.backend.ranks.gradients import NonFiniteError
    from stagecut.backend.ranks.lent import StaleError
    from stagecut.backend.ranks.losses import StepLosses
    from stagecut.backend.ranks.precision import PrecisionError
    from stagecut.backend.ranks.stage import (
        BuiltStage,
        MismatchError,
        PipeInfo,
        build_stage,
    )
    from stagecut.backend.ranks.tied import TiedError
    from stagecut.backend.stages.modules import Stage
    from stagecut.check import CannotCompare, CheckError, Report
    from stagecut.frontend.markers import SplitPoint, pipe_split
    from stagecut.generate import Generator
    from stagecut.ir.errors import (
        BudgetError,
        CaptureError,
        EmitError,
        InputError,
        ModeError,
        ParseError,
        PassError,
        RolesError,
        SplitError,
        StagecutError,
        UnknownNameError,
        VerifyError,
    )
    from stagecut.ir.graph import Program
    from stagecut.ir.run.remembered import ChangedError
    from stagecut.ir.text.parser import parse
    from stagecut.ir.text.printer import text
    from stagecut.pipe import Pipe, load, pipeline
    from stagecut.piped import PipedModel
    from stagecut.pretrained import from_pretrained

__version__ = VERSION

_HOMES = {
    "CannotCompare": "stagecut.check",
    "BudgetError": "stagecut.ir.errors",
    "CaptureError": "stagecut.ir.errors",
    "ChangedError": "stagecut.ir.run.remembered",
    "CheckError": "stagecut.check",
    "CheckpointError": "stagecut.backend.files.checkpoint",
    "EmitError": "stagecut.ir.errors",
    "InputError": "stagecut.ir.errors",
    "MismatchError": "stagecut.backend.ranks.stage",
    "MaterializeError": "stagecut.backend.files.initial",
    "NonFiniteError": "stagecut.backend.ranks.gradients",
    "ParseError": "stagecut.ir.errors",
    "PassError": "stagecut.ir.errors",
    "PrecisionError": "stagecut.backend.ranks.precision",
    "RankError": "stagecut.backend.ranks.faults",
    "RolesError": "stagecut.ir.errors",
    "SavedError": "stagecut.backend.files.untrusted",
    "SplitError": "stagecut.ir.errors",
    "TiedError": "stagecut.backend.ranks.tied",
    "UnknownNameError": "stagecut.ir.errors",
    "VerifyError": "stagecut.ir.errors",
    "checkpoint": "stagecut.backend.files",
    "BuiltStage": "stagecut.backend.ranks.stage",
    "PipeInfo": "stagecut.backend.ranks.stage",
    "PipedModel": "stagecut.piped",
    "Plan": "stagecut.backend.costs.plan",
    "Program": "stagecut.ir.graph",
    "Report": "stagecut.check",
    "Stage": "stagecut.backend.stages.modules",
    "StaleError": "stagecut.backend.ranks.lent",
    "StepLosses": "stagecut.backend.ranks.losses",
    "Timeline": "stagecut.backend.costs.timeline",
    "record": "stagecut.backend.costs.record",
    "to_dot": "stagecut.backend.pictures.dot",
    "to_html": "stagecut.backend.page.page",
    "to_svg": "stagecut.backend.pictures.dot",
    "AtModules": "stagecut.backend.costs.balance",
    "Balanced": "stagecut.backend.costs.balance",
    "Markers": "stagecut.backend.costs.balance",
    "Setting": "stagecut.backend.costs.setting",
    "Device": "stagecut.backend.costs.ops",
    "Driver": "stagecut.backend.ranks.driver",
    "Generator": "stagecut.generate",
    "build_stage": "stagecut.backend.ranks.stage",
    "from_pretrained": "stagecut.pretrained",
    "Pipe": "stagecut.pipe",
    "pipeline": "stagecut.pipe",
    "load": "stagecut.pipe",
    "load_stage": "stagecut.backend.files.saved",
    "SplitPoint": "stagecut.frontend.markers",
    "pipe_split": "stagecut.frontend.markers",
    "ModeError": "stagecut.ir.errors",
    "StagecutError": "stagecut.ir.errors",
    "parse": "stagecut.ir.text.parser",
    "text": "stagecut.ir.text.printer",
}
_TORCHS = (
    "PipelineStage",
    "Schedule1F1B",
    "ScheduleDualPipeV",
    "ScheduleGPipe",
    "ScheduleInterleaved1F1B",
    "ScheduleInterleavedZeroBubble",
    "ScheduleLoopedBFS",
    "ScheduleZBVZeroBubble",
)
"""Further names of torch.distributed.pipelining, so that `import stagecut as pp` can replace its import."""
_HOMES |= dict.fromkeys(_TORCHS, "torch.distributed.pipelining")

__all__ = [
    "AtModules",
    "Balanced",
    "BudgetError",
    "BuiltStage",
    "CannotCompare",
    "CaptureError",
    "ChangedError",
    "CheckError",
    "CheckpointError",
    "Device",
    "Driver",
    "EmitError",
    "Generator",
    "InputError",
    "Markers",
    "MaterializeError",
    "MismatchError",
    "ModeError",
    "NonFiniteError",
    "ParseError",
    "PassError",
    "Pipe",
    "PipeInfo",
    "PipedModel",
    "PipelineStage",
    "Plan",
    "PrecisionError",
    "Program",
    "RankError",
    "Report",
    "RolesError",
    "SavedError",
    "Schedule1F1B",
    "ScheduleDualPipeV",
    "ScheduleGPipe",
    "ScheduleInterleaved1F1B",
    "ScheduleInterleavedZeroBubble",
    "ScheduleLoopedBFS",
    "ScheduleZBVZeroBubble",
    "Setting",
    "SplitError",
    "SplitPoint",
    "Stage",
    "StagecutError",
    "StaleError",
    "StepLosses",
    "TiedError",
    "Timeline",
    "UnknownNameError",
    "VerifyError",
    "build_stage",
    "checkpoint",
    "from_pretrained",
    "load",
    "load_stage",
    "parse",
    "pipe_split",
    "pipeline",
    "record",
    "text",
    "to_dot",
    "to_html",
    "to_svg",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stagecut' has no attribute '{name}'")
    home = import_module(_HOMES[name])
    return (
        getattr(home, name)
        if hasattr(home, name)
        else import_module(f"{_HOMES[name]}.{name}")
    )


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
