"""stagecut cuts PyTorch models into pipeline stages.

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

    from stagecut.backend.costs.balance import AtModules, Balanced, Markers, Setting
    from stagecut.backend.costs.ops import Device
    from stagecut.backend.costs.timeline import record
    from stagecut.backend.files import checkpoint
    from stagecut.backend.files.checkpoint import CheckpointError
    from stagecut.backend.files.manifest import SavedError
    from stagecut.backend.files.materialize import MaterializeError
    from stagecut.backend.files.saved import load_stage
    from stagecut.backend.page.page import to_html
    from stagecut.backend.pictures.dot import to_dot, to_svg
    from stagecut.backend.ranks.driver import Driver
    from stagecut.backend.ranks.faults import RankError
    from stagecut.backend.ranks.gradients import NonFiniteError
    from stagecut.backend.ranks.precision import PrecisionError
    from stagecut.backend.ranks.stage import MismatchError, build_stage
    from stagecut.backend.ranks.tied import TiedError
    from stagecut.check import CannotCompare, CheckError
    from stagecut.frontend.markers import SplitPoint, pipe_split
    from stagecut.ir.errors import (
        CaptureError,
        EmitError,
        InputError,
        ModeError,
        ParseError,
        PassError,
        SplitError,
        StagecutError,
        UnknownNameError,
        VerifyError,
    )
    from stagecut.ir.text.parser import parse
    from stagecut.ir.text.printer import text
    from stagecut.pipe import Pipe, load, pipeline

__version__ = VERSION

_HOMES = {
    "CannotCompare": "stagecut.check",
    "CaptureError": "stagecut.ir.errors",
    "CheckError": "stagecut.check",
    "CheckpointError": "stagecut.backend.files.checkpoint",
    "EmitError": "stagecut.ir.errors",
    "InputError": "stagecut.ir.errors",
    "MismatchError": "stagecut.backend.ranks.stage",
    "MaterializeError": "stagecut.backend.files.materialize",
    "NonFiniteError": "stagecut.backend.ranks.gradients",
    "ParseError": "stagecut.ir.errors",
    "PassError": "stagecut.ir.errors",
    "PrecisionError": "stagecut.backend.ranks.precision",
    "RankError": "stagecut.backend.ranks.faults",
    "SavedError": "stagecut.backend.files.manifest",
    "SplitError": "stagecut.ir.errors",
    "TiedError": "stagecut.backend.ranks.tied",
    "UnknownNameError": "stagecut.ir.errors",
    "VerifyError": "stagecut.ir.errors",
    "checkpoint": "stagecut.backend.files",
    "record": "stagecut.backend.costs.timeline",
    "to_dot": "stagecut.backend.pictures.dot",
    "to_html": "stagecut.backend.page.page",
    "to_svg": "stagecut.backend.pictures.dot",
    "AtModules": "stagecut.backend.costs.balance",
    "Balanced": "stagecut.backend.costs.balance",
    "Markers": "stagecut.backend.costs.balance",
    "Setting": "stagecut.backend.costs.balance",
    "Device": "stagecut.backend.costs.ops",
    "Driver": "stagecut.backend.ranks.driver",
    "build_stage": "stagecut.backend.ranks.stage",
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
    "CannotCompare",
    "CaptureError",
    "CheckError",
    "CheckpointError",
    "Device",
    "Driver",
    "EmitError",
    "InputError",
    "Markers",
    "MaterializeError",
    "MismatchError",
    "ModeError",
    "NonFiniteError",
    "ParseError",
    "PassError",
    "Pipe",
    "PipelineStage",
    "PrecisionError",
    "RankError",
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
    "StagecutError",
    "TiedError",
    "UnknownNameError",
    "VerifyError",
    "build_stage",
    "checkpoint",
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
