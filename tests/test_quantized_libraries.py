"""Bases that torchao and bitsandbytes have quantized train their adapters on ranks as in one process; skipped where these are not
installed (`pip install "stagecut[quantized]"`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cluster.adapters import SAMPLES, Reference, _config, adapted, inputs, loss_of, optimizer_of, train
from cluster.matrix import on_ranks
from torch import nn
from zoo.cuts import equal_ops

from stagecut import Driver, pipeline

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries
STEPS = 3


def _model() -> Any:
    return adapted(_config("LoraConfig", r=4, target_modules=["q_proj", "v_proj"]), torch.float32)


def _by_torchao(config: Callable[[Any], Any]) -> Any:
    """A Llama whose linears below the adapters torchao has quantized."""
    from torchao import quantization

    model = _model()
    quantization.quantize_(model, config(quantization), lambda module, name: isinstance(module, nn.Linear) and "base_layer" in name)
    assert any(type(parameter.data) is not torch.Tensor for parameter in model.parameters())
    return model


def _nf4() -> Any:
    """A Llama whose linears below the adapters bitsandbytes has packed into 4 bits."""
    from bitsandbytes.nn import Linear4bit

    model = _model()
    for module in model.modules():
        linear = getattr(module, "base_layer", None)
        if isinstance(linear, nn.Linear):
            packed: Any = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            packed.load_state_dict(linear.state_dict())
            module.base_layer = packed.to("cpu").requires_grad_(False)
            assert packed.weight.dtype == torch.uint8
    return model


KINDS: dict[str, tuple[str, Callable[[], Any]]] = {
    "int8": ("torchao", lambda: _by_torchao(lambda quantization: quantization.Int8WeightOnlyConfig())),
    "int4": ("torchao", lambda: _by_torchao(lambda quantization: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4))),
    "float8": ("torchao", lambda: _by_torchao(lambda quantization: quantization.Float8WeightOnlyConfig())),
    "nf4": ("bitsandbytes", _nf4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_a_quantized_base_trains_as_in_one_process(kind: str) -> None:
    library, _ = KINDS[kind]
    pytest.importorskip(library, reason=f"{library} is not installed, or not for this machine")
    first, last = on_ranks(2, _train, kind)
    assert first == last
    assert any("kept whole" in note for note in first) is (kind == "nf4"), first


def _train(kind: str) -> list[str]:
    """The notes of a pipe that has been trained beside the unsplit model, with equal losses and gradients."""
    _, make = KINDS[kind]
    model = make()
    torch.manual_seed(3)
    pipe = pipeline(model, (), inputs(SAMPLES), split_policy=equal_ops(2), check=None)
    driver = Driver(pipe, "1F1B", 2, loss_of)
    reference = Reference(make())
    losses = train(driver, optimizer_of(driver), range(STEPS), reference)
    assert len({float(loss) for loss in losses}) == STEPS
    assert all(parameter.grad is None for parameter in driver.parameters() if not parameter.requires_grad)
    return [*pipe.notes]
