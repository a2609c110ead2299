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
    from stagecut.backend.files.saved import load_stage
    from stagecut.backend.ranks.driver import Driver
    from stagecut.backend.ranks.stage import build_stage
    from stagecut.frontend.markers import SplitPoint, pipe_split
    from stagecut.ir.errors import ModeError, StagecutError
    from stagecut.ir.text.parser import parse
    from stagecut.ir.text.printer import text
    from stagecut.pipe import Pipe, load, pipeline

__version__ = VERSION

_HOMES = {
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
"""What torch.distributed.pipelining has besides, so that `import stagecut as pp` stands where that was imported."""
_HOMES |= dict.fromkeys(_TORCHS, "torch.distributed.pipelining")

__all__ = [
    "AtModules",
    "Balanced",
    "Device",
    "Driver",
    "Markers",
    "ModeError",
    "Pipe",
    "PipelineStage",
    "Schedule1F1B",
    "ScheduleDualPipeV",
    "ScheduleGPipe",
    "ScheduleInterleaved1F1B",
    "ScheduleInterleavedZeroBubble",
    "ScheduleLoopedBFS",
    "ScheduleZBVZeroBubble",
    "Setting",
    "SplitPoint",
    "StagecutError",
    "build_stage",
    "load",
    "load_stage",
    "parse",
    "pipe_split",
    "pipeline",
    "text",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stagecut' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
