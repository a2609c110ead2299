"""Trains an architecture of the zoo from a folder of transformers to another, on three ranks and in one process, and compares them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cluster.matrix import on_ranks
from torch import nn
from zoo.cuts import equal_ops
from zoo.models import ARCHITECTURES, Architecture

from stagecut import Driver, checkpoint, from_pretrained

RANKS, STEPS = 3, 3
TINY = 30_000
"""Bytes of a file, so that even small models have several."""


@dataclass(frozen=True)
class Subject:
    """An architecture of the zoo, and what its class is given beside its config."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        return next(each for each in ARCHITECTURES if each.name == self.name)

    def make(self) -> nn.Module:
        """The model, always the same, in double precision and without caches."""
        torch.manual_seed(0)
        model: Any = self.architecture.make().double().eval()
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        for option, value in self.options.items():
            setattr(model.config, f"_{option}", value)
        return model  # type: ignore[no-any-return]

    def batch(self, step: int) -> list[dict[str, Any]]:
        """The micro-batches of a step, the same in every process."""
        torch.manual_seed(step)
        return [{name: _double(item) for name, item in self.architecture.inputs().items()} for _ in range(RANKS)]


SUBJECTS = (
    Subject("LlamaForCausalLM"),
    Subject("Qwen3ForCausalLM"),
    Subject("GemmaForCausalLM"),
    Subject("MistralForCausalLM"),
    Subject("GPT2LMHeadModel"),
    # a way to compute experts that does not ask for the device
    Subject("MixtralForCausalLM", {"experts_implementation": "batched_mm"}),
    Subject("T5ForConditionalGeneration"),
    Subject("BertForMaskedLM"),
    Subject("ViTForImageClassification"),
    Subject("WhisperForConditionalGeneration"),
)


def _double(item: Any) -> Any:
    return item.double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item


def check(subject: Subject, folder: Path) -> list[str]:
    """What is wrong; nothing where the folder that three ranks write is that of one process."""
    start, trained = folder / "start", folder / "trained"
    model: Any = subject.make()
    model.save_pretrained(start, max_shard_size=TINY)
    held = on_ranks(RANKS, _train_on_ranks, subject, start, trained)
    again, info = type(model).from_pretrained(trained, output_loading_info=True, **subject.options)
    # the model itself and not that of the folder, which transformers lets train what its class freezes
    alone: Any = _train_alone(subject, model)
    alone.save_pretrained(folder / "alone", max_shard_size=TINY)
    return [
        *(f"{kind}: {names}" for kind, names in info.items() if names),
        *_unlike_ranks(again.state_dict(), held),
        *_far(again.state_dict(), alone.state_dict()),
        *_unlike(_names_in(trained), _names_in(folder / "alone"), "names in the index"),
        *_unlike(_ties(again), _ties(alone), "ties"),
        *_configs(trained, folder / "alone"),
        *_in_two_stages(subject, trained, again),
    ]


def _train_on_ranks(subject: Subject, start: Path, trained: Path) -> dict[str, torch.Tensor]:
    """The state of this rank after some steps, which `trained` holds."""
    pipe = from_pretrained(start, (), subject.batch(0)[0], split_policy=equal_ops(RANKS), model_kwargs=subject.options)
    driver = Driver(pipe, "1F1B", RANKS, lambda output: output.loss)
    assert [any(p.is_meta for p in stage.parameters()) for stage in pipe.stages] == [i not in driver.stage_indices for i in range(RANKS)]
    optimizer = torch.optim.SGD(driver.parameters(), 0.05, momentum=0.9)
    driver.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        driver.step(kwarg_mbs=subject.batch(step))
        optimizer.step()
    checkpoint.save_pretrained(driver, trained, max_shard_size=TINY)
    return {name: tensor for i in driver.stage_indices for name, tensor in pipe.stages[i].state_dict().items()}


def _train_alone(subject: Subject, model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for inputs in subject.batch(step):
            (model(**inputs).loss / RANKS).backward()
        optimizer.step()
    return model


def _unlike_ranks(state: dict[str, torch.Tensor], held: list[dict[str, torch.Tensor]]) -> list[str]:
    """Every tensor that is not bit for bit what a rank has."""
    return [
        f"'{name}' is not what rank {rank} holds"
        for rank, tensors in enumerate(held)
        for name, tensor in tensors.items()
        if not torch.equal(tensor, state[name])
    ]


def _far(state: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> list[str]:
    if state.keys() != alone.keys():
        return [f"names: {sorted(state.keys() ^ alone.keys())}"]
    return [f"'{name}' is not that of one process" for name in state if not torch.allclose(state[name], alone[name], rtol=1e-7, atol=1e-9)]


def _unlike(one: Any, other: Any, what: str) -> list[str]:
    return [] if one == other else [f"{what}: {one} instead of {other}"]


def _names_in(folder: Path) -> list[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > RANKS
    return [*sorted(index["weight_map"]), str(index["metadata"])]


def _ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _configs(one: Path, other: Path) -> list[str]:
    """Files beside the tensors that differ."""
    names = {path.name for folder in (one, other) for path in folder.glob("*config.json")}
    return [name for name in names if _settings(one / name) != _settings(other / name)]


def _settings(file: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    settings.pop("problem_type", None)  # written by forward, when it computes a loss
    return settings


def _in_two_stages(subject: Subject, folder: Path, model: nn.Module) -> list[str]:
    """A pipe with another number of stages has the same tensors, and computes the same."""
    inputs = subject.batch(0)[0]
    pipe = from_pretrained(folder, (), inputs, split_policy=equal_ops(2), model_kwargs=subject.options)
    state = pipe.state_dict()
    wrong = [f"'{name}' in two stages" for name, tensor in model.state_dict().items() if not torch.equal(state[name], tensor)]
    with torch.no_grad():
        logits = model(**inputs).logits, pipe.module()(**inputs).logits
    return wrong if torch.allclose(*logits, rtol=1e-9, atol=1e-12) else [*wrong, "logits in two stages"]
