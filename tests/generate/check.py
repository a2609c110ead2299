"""Generates with a decoder of the zoo by `model.generate` and by a `Generator` of two stages, and compares the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from generate.vision import VISION
from torch import nn
from zoo.models import ARCHITECTURES, Architecture

from stagecut import Generator

NEW, ROWS, LENGTH = 20, 3, 7
WAYS: tuple[dict[str, Any], ...] = (
    {"do_sample": False, "num_beams": 1},
    {"do_sample": True, "num_beams": 1, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2},
)
"""Greedy decoding, and sampling through several processors."""


def decoders() -> list[Architecture]:
    """The architectures of the zoo that generate, each once, and vision-language models."""
    chosen: dict[str, Architecture] = {}
    for architecture in [*ARCHITECTURES, *VISION]:
        if _generates(architecture):
            chosen.setdefault(architecture.name.partition(" ")[0], architecture)
    return [*chosen.values()]


def _generates(architecture: Architecture) -> bool:
    import transformers

    cls = getattr(transformers, architecture.name.partition(" ")[0], None)
    wanted = ("decoder", "moe", "recurrent", "encoder-decoder", "audio", "vision-language")
    return architecture.family in wanted and cls is not None and bool(cls.can_generate())


def make(architecture: Architecture) -> nn.Module:
    """The model with random weights that differ enough for tokens to differ."""
    config = {key: value for key, value in architecture.config.items() if key != "use_cache"}
    torch.manual_seed(0)
    model = Architecture(architecture.name, architecture.family, architecture.inputs, config).make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def request(architecture: Architecture) -> dict[str, Any]:
    """Three prompts of unlike lengths, padded on the left."""
    if architecture in VISION:
        return architecture.inputs()
    torch.manual_seed(1)
    given = architecture.inputs()
    ids = torch.randint(5, 90, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, :1] = 0
    ids[mask == 0] = 0
    others = {name: torch.cat([leaf, leaf[:1]]) for name, leaf in given.items() if name in ("pixel_values", "input_features")}
    if "input_features" in others:
        return others
    if "pixel_values" in others and "input_ids" in given:
        ids = torch.cat([given["input_ids"], given["input_ids"][:1]])
        mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask} | others


def check(architecture: Architecture, group: dist.ProcessGroup | None = None) -> str:
    """'ok', or what is wrong."""
    model = make(architecture)
    call = request(architecture) | {"max_new_tokens": NEW, "pad_token_id": 0}
    expected = []
    for way in WAYS:
        torch.manual_seed(5)
        try:
            expected.append(model.generate(**call, **way))  # type: ignore[operator]
        except Exception as error:
            return f"the model itself: {_summary(error)}"
    try:
        generator = Generator(model, stages=2, group=group)
        for way, tokens in zip(WAYS, expected, strict=True):
            torch.manual_seed(5)
            found = generator.generate(**call, **way)
            if any(pipe.num_stages != 2 for pipe in generator.pipes):
                return f"stages: {[pipe.num_stages for pipe in generator.pipes]}"
            if not torch.equal(found, tokens):
                return f"DIFFERENT tokens, {'sampled' if way['do_sample'] else 'greedy'}"
    except Exception as error:
        return _summary(error)
    return "ok"


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {next((line.strip() for line in str(error).splitlines() if line.strip()), 'no message')}"


def on_rank(rank: int, index: int, folder: str) -> None:
    """What `check` says on one of two ranks, in a file of the folder."""
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=timedelta(seconds=240), rank=rank, world_size=2)
    result = check(decoders()[index], dist.group.WORLD)
    Path(folder, f"rank{rank}").write_text(result)


def results_in(folder: Path) -> Iterator[str]:
    """What the ranks said."""
    for rank in range(2):
        path = folder / f"rank{rank}"
        yield path.read_text() if path.exists() else f"rank {rank} said nothing"
