"""Modules that the model calls as `m.forward(x)`, or out of a slice: they are cut, switched and kept whole as those it calls."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from test_pipe import assert_does_the_same, held_modules
from torch import nn

from stagecut import SplitPoint, pipeline
from stagecut.ir.errors import CaptureError, SplitError
from stagecut.ir.graph import scope_fqn

X = torch.randn(2, 4, dtype=torch.float64)


class Base(nn.Module):
    """A layer whose parts are called by their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop.forward(torch.relu(self.linear.forward(x)))


class Layer(Base):
    """Runs the forward of its base, and norms after it by the function of the class."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.LayerNorm.forward(self.norm, super().forward(x))


class Own(Layer):
    """Has a call of its own."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.forward(x) * 2


class Model(nn.Module):
    """Calls layers by their forward, the first one twice and by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer(), Own(), Own()])
        self.again = self.layers[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:3]:
            x = layer.forward(x)
        return self.again.forward(self.layers[3](x))  # type: ignore[operator]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"layers.1": SplitPoint.BEGINNING}, 2),
        ({"layers.1": SplitPoint.END, "layers.2": SplitPoint.END}, 3),
        ({"layers.1.linear": SplitPoint.END}, 2),
        ({"layers.1.norm": SplitPoint.BEGINNING}, 2),
        ({"layers.3": SplitPoint.BEGINNING}, 2),
        ({"again": SplitPoint.BEGINNING}, 2),
    ],
)
def test_a_split_point_may_be_at_a_forward(spec: dict[str, SplitPoint], expected: int, training: bool) -> None:
    """As in torch's frontend. Each op knows its module, as for any call."""
    model = Model().double().train(training)
    pipe = pipeline(model, (X,), split_spec=spec)
    assert pipe.num_stages == expected
    assert {scope_fqn(op.scope) for op in pipe.program.all_ops() if op.target == "aten.linear.default"} >= {
        "layers.1.linear",
        "again.linear",
    }
    assert_does_the_same(model, pipe, (X,))


def test_a_part_that_is_called_by_its_forward_has_a_mode_of_its_own() -> None:
    """Its dropout follows its own flag, and not that of the module which calls it."""
    model = Model().double()
    model.layers[1].eval()
    pipe = pipeline(model, (X,))
    modes = {scope_fqn(op.scope): bool(op.args[2].captured) for op in pipe.program.all_ops() if op.target == "aten.dropout.default"}
    assert modes["layers.1.drop"] is False
    assert modes["layers.2.drop"] is True
    assert_does_the_same(model, pipe, (X,))


@pytest.mark.parametrize("path", ["layers.1", "again", "layers.1.linear"])
def test_a_module_that_is_called_by_its_forward_is_kept_whole(path: str) -> None:
    """And can be cut at."""
    model = Model().double().eval()
    pipe = pipeline(model, (X,), leaf_modules=[path], split_spec={path: SplitPoint.END} if path != "again" else None)
    assert any(op.target.startswith("module.") for op in pipe.program.all_ops())
    assert_does_the_same(model, pipe, (X,))


class Hooked(Model):
    """A hook of a layer, which its forward does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1].register_forward_hook(lambda module, args, result: result * 100)


def test_a_hook_of_a_module_that_is_called_by_its_forward_does_not_run() -> None:
    """No call stands for it then, and it cannot be cut at; what is in it can."""
    model = Hooked().double().eval()
    assert_does_the_same(model, pipeline(model, (X,), split_spec={"layers.1.linear": SplitPoint.BEGINNING}), (X,))
    with pytest.raises(SplitError, match=r"m\.forward\(x\) of a module without hooks"):
        pipeline(model, (X,), split_spec={"layers.1": SplitPoint.BEGINNING})
    for path in ("layers.1", "layers.2", "layers.3"):
        with pytest.raises(CaptureError, match=f"'{path}' is kept whole, and its forward is called past its hooks or its __call__"):
            pipeline(model, (X,), leaf_modules=[path])


class Positions(nn.Embedding):
    """Makes the positions itself, and has a second method for positions that are given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.arange(len(x)))

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        return super().forward(positions)


class Positioned(nn.Module):
    """Asks for the forward of a base from outside of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.linear = Positions(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + self.positions(x)) * self.positions.at(torch.tensor([3, 2]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("whole", [[], ["positions"]])
def test_the_forward_of_a_base_is_no_call_of_the_module(whole: list[str]) -> None:
    """A call would run another forward. ProphetNet does this."""
    model = Positioned().double()
    assert_does_the_same(model, pipeline(model, (X,), leaf_modules=whole, split_spec={"linear": SplitPoint.END}), (X,))


class Branching(Model):
    """Calls layers inside the branches of a conditional, which torch traces in another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.layers[1].linear, self.layers[0].linear
        found: torch.Tensor = torch.cond(x.sum() > 0, lambda x: one(x), lambda x: other.forward(x), (x,))  # type: ignore[operator]
        return self.layers[0].forward(found)  # type: ignore[operator]


def test_branches_call_layers_too() -> None:
    model = Branching().double().eval()
    pipe = pipeline(model, (X,), split_spec={"layers.0": SplitPoint.BEGINNING})
    assert pipe.num_stages == 2
    with torch.no_grad():
        for x in (X, -X):
            torch.testing.assert_close(pipe(x)[0], model(x), rtol=0, atol=0)


class Sliced(nn.Module):
    """Takes its layers out of slices; one layer has a second name, which makes the tracer count anew in each slice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(5))
        self.rest = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.same = self.layers[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[1:][::2]:
            x = layer(x)
        return self.rest[1:](self.same(self.layers[-2:][1](x)))  # type: ignore[no-any-return]


def test_parts_of_slices_have_the_model_s_names() -> None:
    """A slice itself is no module of the model."""
    model = Sliced().double()
    model.layers[3].eval()
    pipe = pipeline(model, (X,), split_spec={"layers.3": SplitPoint.BEGINNING, "layers.4": SplitPoint.END})
    assert pipe.num_stages == 3
    scopes = [scope_fqn(op.scope) for op in pipe.program.all_ops() if op.target == "aten.linear.default"]
    assert scopes == ["layers.1.0", "layers.3.0", "layers.4.0", "same.0", "rest.2"]
    modes = [op.args[2].captured for op in pipe.program.all_ops() if op.target == "aten.dropout.default"]
    assert modes == [True, False, True, True]
    assert_does_the_same(model, pipe, (X,))


def test_classes_are_as_they_were() -> None:
    """Also where the trace fails."""

    class Failing(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            return x if x.sum() > 0 else -x

    kept = [cls.forward for cls in (Base, Layer, Own, Model, Failing, nn.Linear, nn.Dropout)]
    pipeline(Model().double(), (X,))
    with pytest.raises(Exception, match="Failing cannot be traced") as caught:
        pipeline(Failing().double(), (X,))
    assert "test_scopes.py" in str(caught.value)
    assert [cls.forward for cls in (Base, Layer, Own, Model, Failing, nn.Linear, nn.Dropout)] == kept


def test_squeezebert() -> None:
    """Its encoder calls every layer by its forward."""
    from transformers import SqueezeBertConfig, SqueezeBertModel

    groups: dict[str, Any] = dict.fromkeys(
        ("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups", "output_groups"), 1
    )
    config = SqueezeBertConfig(
        hidden_size=16, embedding_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, vocab_size=32, **groups
    )
    model = SqueezeBertModel(config).eval()
    ids = torch.randint(32, (2, 6))
    pipe = pipeline(model, (ids,), split_spec={f"encoder.layers.{i}": SplitPoint.BEGINNING for i in (1, 2, 3)})
    assert pipe.num_stages == 4
    assert held_modules(pipe) == [{"embeddings", "encoder"}, {"encoder"}, {"encoder"}, {"encoder", "pooler"}]
    torch.testing.assert_close(pipe.module()(ids).last_hidden_state, deepcopy(model)(ids).last_hidden_state, rtol=0, atol=0)
