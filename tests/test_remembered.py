"""A model whose attributes are other ones than those that its trace read is no longer the one that was cut."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster.adapters import SAMPLES, inputs, lora, loss_of, optimizer_of, train
from cluster.matrix import on_ranks
from torch import nn
from zoo.cuts import equal_ops

from stagecut import ChangedError, Driver, Pipe, SplitPoint, checkpoint, pipeline

X = torch.randn(2, 4)


class Layer(nn.Module):
    """Reads attributes of all kinds."""

    of_class = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.0)
        self.number, self.flag, self.text, self.nothing = 1.0, False, "relu", None
        self.listed, self.named, self.nested = [1.0], {"a": 1.0}, {"a": [1.0, (2.0,)]}
        self.kind = torch.float32
        self.unread, self.last = 1.0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x.shape[0]
        x = self.drop(self.linear(x)) * self.number * self.of_class * self.listed[0] * self.named["a"] * self.nested["a"][1][0]
        x = x.to(self.kind) * self.last
        if self.flag or self.nothing or hasattr(self, "late"):
            x = -x
        if not self.training:
            x = x + self.only_in_eval
        return x.relu() if self.text == "relu" else x

    only_in_eval = 0.5


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def cut(model: nn.Module, **options: Any) -> Pipe:
    return pipeline(model, (X,), split_spec={"layers.1": SplitPoint.BEGINNING}, **options)


def _set(name: str, value: Any) -> Callable[[Layer], None]:
    return lambda layer: setattr(layer, name, value)


CHANGES: dict[str, Callable[[Layer], Any]] = {
    "number": _set("number", 2.0),
    "flag": _set("flag", True),
    "text": _set("text", "none"),
    "nothing": _set("nothing", X),
    "of_class": _set("of_class", 2.0),
    "kind": _set("kind", torch.float64),
    "listed": lambda layer: layer.listed.append(1.0),
    "named": lambda layer: layer.named.update(a=2.0),
    "nested": lambda layer: layer.nested["a"].reverse(),
    "late": _set("late", 1),
    "only_in_eval": _set("only_in_eval", 1.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_noticed_and_named(name: str, tmp_path: Path) -> None:
    model = Model()
    pipe = cut(model)
    layer: Any = model.layers[1]
    before = deepcopy(vars(layer).get(name, "nothing there"))
    CHANGES[name](layer)
    for call in (lambda: pipe(X), lambda: pipe.module()(X), lambda: pipe.save(tmp_path / "pipe")):
        with pytest.raises(ChangedError, match=rf"'{name}' of the model was .* when it was cut, and is .* now") as raised:
            call()
        assert "module 'layers.1', a Layer" in str(raised.value)
    assert not [*tmp_path.iterdir()]
    if before == "nothing there":
        delattr(layer, name)
    else:
        setattr(layer, name, before)
    assert torch.equal(pipe(X)[0], model(X))


@pytest.mark.parametrize("fold", [False, True])
def test_a_change_in_any_layer_is_noticed_whether_it_was_traced_by_itself_or_not(fold: bool) -> None:
    model = Model(7)
    pipe = cut(model, fold=fold)
    for number, layer in enumerate(model.layers):
        for part, name, value in ((layer, "number", 2.0), (layer.drop, "p", 0.5)):
            before = getattr(part, name)
            setattr(part, name, value)
            with pytest.raises(ChangedError, match=rf"'{name}' of the model was(.|\n)*'layers.{number}(.drop)?', a"):
                pipe(X)
            setattr(part, name, before)
    pipe(X)


QUIET: dict[str, Callable[[Any], Any]] = {
    "what the code does not read": lambda model: setattr(model.layers[1], "unread", 2.0),
    "what the code writes": lambda model: model(torch.cat([X, X])),
    "more keys": lambda model: model.layers[1].named.update(b=2.0),
    "equal containers": lambda model: setattr(model.layers[1], "nested", {"a": [1.0, (2.0,)]}),
    "modes": lambda model: model.eval(),
    "weights": lambda model: model.layers[1].linear.requires_grad_(False).weight.data.zero_(),
    "compiled": lambda model: model.compile(),
}


@pytest.mark.parametrize("name", QUIET)
def test_what_changes_no_result_raises_nothing(name: str) -> None:
    model = Model()
    pipe = cut(model)
    QUIET[name](model)
    pipe(X)


def test_pipes_that_know_no_model_or_shall_not_ask_it_go_on() -> None:
    torch.manual_seed(0)
    model = Model()
    pipe = cut(model)
    expected = pipe(X)[0]
    copies = [deepcopy(pipe), pickle.loads(pickle.dumps(pipe))]
    model.layers[1].number = 2.0  # type: ignore[assignment]
    for one in (*copies, cut(model), pipe.keep_as_cut()):
        assert torch.equal(one(X)[0], expected) is (one in copies or one is pipe)
    other = Model()
    pipe = cut(other)
    other.layers[1].number = 2.0  # type: ignore[assignment]
    del other
    gc.collect()
    pipe(X)


class WithLeaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scaled(), Scaled()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Scaled(nn.Module):
    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_a_module_that_is_kept_whole_reads_its_attributes_itself() -> None:
    model = WithLeaf()
    pipe = cut(model, leaf_modules=["layers.1"])
    model.layers[1].scale = 3.0  # type: ignore[assignment]
    assert torch.equal(pipe(X)[0], 3 * X)
    model.layers[0].scale = 3.0  # type: ignore[assignment]
    with pytest.raises(ChangedError, match=r"'scale' of the model was 1\.0 when"):
        pipe(X)


# --- adapters -------------------------------------------------------------------------------------------

quiet_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def _scale(model: Any, scale: float) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)


ADAPTER_CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "merge_adapter": (lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()),
    "set_adapter": (lambda model: model.set_adapter("second"), lambda model: model.set_adapter("default")),
    "disable_adapter": (lambda model: model.base_model.disable_adapter_layers(), lambda model: model.base_model.enable_adapter_layers()),
    "set_scale": (lambda model: _scale(model, 3.0), lambda model: _scale(model, 1.0)),
}


@quiet_peft
def test_what_peft_does_to_an_adapter_is_noticed_until_it_is_undone(tmp_path: Path) -> None:
    from peft import LoraConfig

    model: Any = lora().eval()
    given = inputs(SAMPLES)
    pipe = pipeline(model, (), given, split_policy=equal_ops(2), check=None)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))  # beside it
    expected = pipe(**given)[0]
    for change, undo in ADAPTER_CHANGES.values():
        change(model)
        with pytest.raises(ChangedError):
            pipe(**given)
        with pytest.raises(ChangedError):
            checkpoint.save_adapter(pipe, tmp_path / "adapter", adapter="default")
        undo(model)
        torch.testing.assert_close(pipe(**given)[0], expected)
    with model.disable_adapter():
        reference = pipeline(model, (), given, split_policy=equal_ops(2), check=None).keep_as_cut()
        without = model(**given).loss
    torch.testing.assert_close(reference(**given)[0], without)
    assert not torch.equal(pipe(**given)[0], without)
    model = model.merge_and_unload()
    gc.collect()
    with pytest.raises(ChangedError, match=r"'merged_adapters' of the model was \[\] when it was cut, and is \['default'\]"):
        pipe(**given)


@quiet_peft
def test_ranks_refuse_a_merged_model_together_and_go_on_when_it_is_undone(tmp_path: Path) -> None:
    assert on_ranks(2, _merge, tmp_path) == ["ok", "ok"]


def _merge(folder: Path) -> str:
    model: Any = lora()
    pipe = pipeline(model, (), inputs(SAMPLES), split_policy=equal_ops(2), check=None)
    driver = Driver(pipe, "1F1B", 2, loss_of)
    optimizer = optimizer_of(driver)
    (before,) = train(driver, optimizer, range(1))
    model.merge_adapter()
    for call in (lambda: train(driver, optimizer, range(1)), lambda: checkpoint.save(driver, optimizer, folder / "step")):
        with pytest.raises(ChangedError, match="'merged_adapters' of the model was"):
            call()
    assert not [*folder.iterdir()]
    model.unmerge_adapter()
    (after,) = train(driver, optimizer, range(1, 2))
    assert before != after
    return "ok"
