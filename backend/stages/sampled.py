"""A few numbers of each tensor of a model. They differ where models were built with other random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from stagecut.backend.stages.modules import Stage, find
from stagecut.ir.graph import Program

Samples = dict[int, tuple[float, ...]]
"""The place of an entry in the state of a program -> numbers of its tensor."""

_SAMPLES = 4
_NEAR = 0.01
_DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16


def sampled(program: Program, stages: Iterable[Stage]) -> Samples:
    """Numbers of the parameters and buffers that these stages hold. Tensors without values, sharded and
    quantized ones, and those of other dtypes than usual floats are left out.
    """
    places: dict[torch.device, list[int]] = {}
    numbers: dict[torch.device, list[torch.Tensor]] = {}
    held = {stage.index: stage for stage in stages}
    for place, entry in enumerate(program.state):
        stage = next((index for index in entry.stages if index in held), None)
        if stage is None or entry.kind == "const":
            continue
        tensor = find(held[stage], program.stages[stage].state[entry][0])
        if tensor is None or not _has_numbers(tensor):
            continue
        places.setdefault(tensor.device, []).append(place)
        numbers.setdefault(tensor.device, []).append(_sample(tensor))
    samples: Samples = {}
    for device, of_device in places.items():
        # one transfer from each device
        rows: list[list[float]] = torch.stack(numbers[device]).tolist()
        samples |= zip(of_device, map(tuple, rows), strict=True)
    return samples


def is_as_sampled(then: tuple[float, ...], now: tuple[float, ...]) -> bool:
    """True for the same numbers in another dtype or a little later in training."""
    return all(map(_is_near, then, now))


def _is_near(then: float, now: float) -> bool:
    return math.isclose(then, now, rel_tol=_NEAR)


def _has_numbers(tensor: torch.Tensor) -> bool:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    plain = tensor.layout is torch.strided and tensor.dtype in _DTYPES
    return plain and not tensor.is_meta and tensor.numel() > 0


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers from all over a tensor."""
    steps = torch.arange(1, 2 * _SAMPLES, 2, device=tensor.device)
    indices = steps * tensor.numel() // (2 * _SAMPLES)
    return tensor.detach().take(indices).to(torch.float64)
