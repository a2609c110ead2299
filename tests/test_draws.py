"""Draws from generators that are not torch's: whether a trace depends on them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stagecut import StagecutError, pipeline
from stagecut.backend.ranks.draws import draws
from stagecut.frontend.capture import capture
from stagecut.frontend.watch.generators import HIGHEST, LOWEST, MIDDLE, Generators

X = torch.randn(2, 4)
OWN, NUMPYS = random.Random(3), numpy.random.RandomState(3)


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand, OWN.random, NUMPYS.rand])
def test_a_generator_can_be_steered(draw: Callable[[], float]) -> None:
    """Many draws long; afterwards it is as it was."""
    generators = Generators([OWN, NUMPYS])
    expected = [draw() for _ in range(300)]
    generators.restore()
    for word, low, high in ((LOWEST, 0.0, 1e-6), (MIDDLE, 0.499, 0.501), (HIGHEST, 1 - 1e-6, 1.0)):
        generators.steer(word)
        assert all(low <= draw() <= high for _ in range(150))
        assert len({draw() for _ in range(2000)}) > 1000  # it goes on at random
    generators.steer(None)
    assert [draw() for _ in range(300)] != expected
    assert generators.can_be_steered()
    generators.restore()
    assert [draw() for _ in range(300)] == expected
    generators.restore()


class Drawing(nn.Module):
    """Does what it is told with numbers that it draws."""

    def __init__(self, use: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.use, self.rate = nn.Linear(4, 4), use, 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self, self.layer(x))


def _range(_: Any, x: torch.Tensor) -> torch.Tensor:
    return x if 0.45 < random.random() < 0.55 else -x


READ: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "a rare branch": lambda _, x: x if random.random() < 1e-6 else -x,
    "a frequent branch": lambda _, x: x if random.random() < 1 - 1e-6 else -x,
    "a range": _range,
    "a choice": lambda _, x: random.choice([x, x * 2, x * 3]),
    "an order": lambda _, x: x[:, random.sample(range(4), 4)],
    "numpy's": lambda _, x: x * float(numpy.random.normal()),
    "a RandomState's": lambda _, x: x if NUMPYS.rand() < 0.01 else -x,
}
UNREAD: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "a number in eval mode": lambda m, x: x if not (m.training and random.random() < 0.5) else -x,
    "a number that is kept for nobody": lambda m, x: (random.uniform(0, 1), x)[1],
    "a rate of nothing": lambda m, x: x if random.random() < m.rate else -x,
    "a seed of its own": lambda m, x: x * (random.seed(3), random.random())[1],
    "one of equals": lambda m, x: random.choice([x, x]),
}


@pytest.mark.parametrize("name", READ)
def test_a_number_that_is_read_is_refused(name: str) -> None:
    """However the example's number fell, with the line that draws it."""
    with pytest.raises(StagecutError, match=r"forward draws from .* or seeds it") as caught:
        pipeline(Drawing(READ[name]).eval(), (X,))
    assert "test_draws.py:" in str(caught.value)


@pytest.mark.parametrize("name", UNREAD)
def test_a_number_that_nothing_depends_on_is_no_reason_to_refuse(name: str) -> None:
    """A note says that the stages do not draw; all generators are as they were."""
    model = Drawing(UNREAD[name]).eval()
    before = random.getstate()
    pipe = pipeline(model, (X,), check=None)
    assert random.getstate() == before
    if name != "a number in eval mode":
        assert pipe.notes == ("forward draws from Python's random, and nothing depends on what it draws: the stages do not draw",)
    torch.testing.assert_close(pipe(X)[0], model(X), rtol=0, atol=0)


def test_only_a_model_that_draws_is_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call by itself, where the first trace may have folded calls, and once for every way to steer."""
    traced: list[int] = []
    export = torch.export.export

    def counting(*args: Any, **kwargs: Any) -> Any:
        traced.append(1)
        return export(*args, **kwargs)

    monkeypatch.setattr(capture.torch.export, "export", counting)
    pipeline(nn.Linear(X.shape[-1], 2), (X,), check=None)
    assert len(traced) == 1
    pipeline(Drawing(UNREAD["a rate of nothing"]).eval(), (X,), check=None)
    assert len(traced) == 1 + 1 + 5


def _musicgen(layerdrop: float) -> nn.Module:
    from transformers import MusicgenDecoderConfig
    from transformers.models.musicgen.modeling_musicgen import MusicgenForCausalLM

    config = MusicgenDecoderConfig(
        vocab_size=32, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, num_codebooks=2, layerdrop=layerdrop
    )
    return MusicgenForCausalLM(config)


def test_musicgen() -> None:
    """It draws a number for every layer, in every mode, and reads it in training."""
    tokens = {"input_ids": torch.randint(32, (4, 5)), "use_cache": False}
    model = _musicgen(0.3).eval()
    pipe = pipeline(model, (), tokens)
    torch.testing.assert_close(pipe.module()(**tokens).logits, model(**tokens).logits, rtol=0, atol=0)
    assert any("draws from Python's random" in note for note in pipe.notes)
    with pytest.raises(StagecutError, match=r"(?s)draws from Python's random.*dropout_probability = random.uniform"):
        pipeline(model.train(), (), tokens)


@pytest.mark.parametrize(("rate", "drawing"), [(0.0, False), (0.5, True), (None, True)])
def test_attention_without_dropout_draws_nothing(rate: float | None, drawing: bool) -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            p = rate if rate is not None else 0.5 * self.training
            return F.scaled_dot_product_attention(x, x, x, None, p)

    assert draws(pipeline(Attention(), (torch.randn(1, 2, 4, 8),), stages=1).program) is drawing
