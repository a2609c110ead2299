"""Small Llamas with frozen weights and trained adapters: those of peft, and one of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from cluster.models import VOCABULARY, _llama
from cluster.training import gradients_differ
from torch import nn
from zoo.cuts import equal_ops

from stagecut import Driver, Pipe, pipeline

ATTENTION = ["q_proj", "v_proj"]


class Int8Linear(nn.Module):
    """A linear whose weight is 8-bit integers, and a scale for each row."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


class Beside(nn.Module):
    """What is frozen, and beside it two narrow linears that are trained."""

    def __init__(self, frozen: Any, dtype: torch.dtype, rank: int = 2) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False, dtype=dtype)
        self.up = nn.Linear(rank, frozen.out_features, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.frozen(x) + self.up(self.down(x)) * 0.5
        return result


def own_lora() -> nn.Module:
    """A LoRA that a user wrote, in every attention."""
    return _beside(lambda linear: linear)


def own_qlora() -> nn.Module:
    """The same on weights of 8 bits."""
    return _beside(Int8Linear)


def _beside(frozen: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model = base().requires_grad_(False)
    for module in [*model.modules()]:
        for name in ATTENTION:
            if isinstance(linear := getattr(module, name, None), nn.Linear):
                setattr(module, name, Beside(frozen(linear), linear.weight.dtype))
    return model


def full() -> nn.Module:
    """All of the model is trained."""
    return base()


def base(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The Llama below the adapters, always the same."""
    torch.manual_seed(0)
    model: Any = _llama()
    model.config.use_cache = False
    return model.to(dtype)  # type: ignore[no-any-return]


def adapted(config: Any, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The Llama with an adapter of peft, in which nothing is zero and nothing draws."""
    from peft import get_peft_model

    model: Any = get_peft_model(base(dtype), config)
    if dtype == torch.float64:
        model.double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    return model  # type: ignore[no-any-return]


def lora() -> nn.Module:
    """peft's LoRA, as its users make it."""
    return adapted(_config("LoraConfig", r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"))


def upper_lora() -> nn.Module:
    """A LoRA in the last layer only, so that other ranks train nothing."""
    return adapted(_config("LoraConfig", r=4, target_modules=ATTENTION, layers_to_transform=[3]))


def lower_lora() -> nn.Module:
    """A LoRA in the first layer only, so that gradients go through stages which train nothing."""
    return adapted(_config("LoraConfig", r=4, target_modules=ATTENTION, layers_to_transform=[0]))


def saved_lora() -> nn.Module:
    """A LoRA beside a head that is trained as a whole, and one of the embedding."""
    return adapted(_config("LoraConfig", r=4, target_modules=[*ATTENTION, "embed_tokens"], modules_to_save=["lm_head"]))


def dora() -> nn.Module:
    """peft's DoRA, in every linear but the head."""
    return adapted(_config("LoraConfig", r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"))


def ia3() -> nn.Module:
    """peft's IA3."""
    return adapted(
        _config("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    )


def mixed_lora() -> nn.Module:
    """A base in bfloat16, and adapters in float32."""
    return adapted(_config("LoraConfig", r=4, target_modules=ATTENTION), torch.bfloat16)


def _config(name: str, **options: Any) -> Any:
    import peft

    return getattr(peft, name)(**options)


ADAPTERS: dict[str, Callable[[], nn.Module]] = {
    made.__name__: made for made in (lora, upper_lora, lower_lora, saved_lora, dora, ia3, mixed_lora, own_lora, own_qlora, full)
}


def inputs(samples: int) -> dict[str, Any]:
    """A batch of that size, drawn."""
    ids = torch.randint(3, VOCABULARY, (samples, 6))
    return {"input_ids": ids, "labels": ids.flip(0)}


def train(driver: Driver, optimizer: torch.optim.Optimizer, steps: range, reference: Reference | None = None) -> list[torch.Tensor]:
    """The loss of each step. With a reference, which trains beside, losses and gradients have been those of one process."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        batch = inputs(SAMPLES * driver.n_microbatches)
        optimizer.zero_grad()
        _, found = driver.step(**batch)
        assert found.batch is not None
        losses.append(found.batch)
        if reference is not None:
            torch.testing.assert_close(found.batch, reference.loss(batch, driver.n_microbatches))
            assert gradients_differ(driver, reference.model) == ""
            reference.optimizer.step()
        optimizer.step()
    return losses


SAMPLES = 2
"""Samples of a micro-batch."""


class Reference:
    """The unsplit model in this process, which trains on the same micro-batches."""

    def __init__(self, model: nn.Module) -> None:
        self.model = deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), RATE)

    def train(self, steps: range, count: int) -> torch.Tensor:
        """The loss of each step, of so many micro-batches."""
        losses = []
        for step in steps:
            torch.manual_seed(step)
            losses.append(self.loss(inputs(SAMPLES * count), count))
            self.optimizer.step()
        return torch.stack(losses)

    def loss(self, batch: dict[str, Any], count: int) -> torch.Tensor:
        """The loss of a batch, whose gradients the model has."""
        self.optimizer.zero_grad()
        losses = []
        for index in range(count):
            loss = self.model(**{name: item.chunk(count)[index] for name, item in batch.items()}).loss
            (loss / count).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()


RATE = 0.01


def optimizer_of(driver: Driver) -> torch.optim.Optimizer:
    """One for all parameters of this rank, frozen ones too, attached."""
    optimizer = torch.optim.AdamW(driver.parameters(), RATE)
    driver.attach(optimizer)
    return optimizer


def loss_of(output: Any) -> torch.Tensor:
    """The loss that the model computes."""
    loss: torch.Tensor = output["loss"]
    return loss


def cut(name: str, stages: int) -> tuple[nn.Module, Pipe]:
    """A model of that name, always the same, and its pipe."""
    model = ADAPTERS[name]()
    torch.manual_seed(3)
    return model, pipeline(model, (), inputs(SAMPLES), split_policy=equal_ops(stages), check=None)


def train_each(work: list[tuple[nn.Module, Pipe, list[str]]], steps: int) -> None:
    """Every pipe has been trained under every one of its schedules as in one process, and nothing frozen had a gradient or a state."""
    for model, pipe, schedules in work:
        start = deepcopy(model.state_dict())
        for schedule in schedules:
            model.load_state_dict(start)
            driver = Driver(pipe, schedule, 4, loss_of)
            optimizer = optimizer_of(driver)
            train(driver, optimizer, range(steps), Reference(model))
            assert {*optimizer.state} == {p for p in driver.parameters() if p.requires_grad}
            assert all(p.grad is None for p in driver.parameters() if not p.requires_grad)
