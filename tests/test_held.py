"""A model of which a parameter or a module was replaced is no longer the one that was cut."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster.adapters import SAMPLES, inputs, lora, loss_of, optimizer_of, train
from cluster.matrix import on_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from zoo.cuts import equal_ops

from stagecut import ChangedError, Driver, Pipe, SplitPoint, load, pipeline

X = torch.randn(2, 4)


class Block(nn.Module):
    """Parameters, a buffer, and a module without any."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act, self.norm = nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)
        self.unused, self.loss = nn.Linear(4, 4), nn.MSELoss()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.act(self.linear(x))) * self.scale
        return y


class Adapted(nn.Module):
    """Adds to what a module computes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.added = base, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x) + self.added(x)
        return y


_LINEAR = type("Linear", (Adapted,), {})
"""Libraries of adapters name their classes after torch's."""


class Model(nn.Module):
    """Blocks, a list and a tied head."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.steps = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.0))
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.tied(self.head(self.steps(x)))
        return y


def cut(model: nn.Module, **options: Any) -> Pipe:
    return pipeline(model, (X,), split_spec={"blocks.1": SplitPoint.BEGINNING}, **options)


def _set(path: str, value: Callable[[], Any]) -> Callable[[nn.Module], None]:
    owner, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(owner), name, value())


def _own() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 4))


REPLACED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a parameter": (_set("blocks.1.linear.weight", _own), r"parameter 'weight'(.|\n)*'blocks.1.linear', a Linear"),
    "one of a module with modules": (_set("blocks.1.scale", lambda: nn.Parameter(torch.ones(4))), r"'scale'(.|\n)*'blocks.1', a Block"),
    "a tied one": (_set("head.weight", _own), "parameter 'weight'(.|\n)*'head'"),
    "the other name of it": (_set("tied.weight", _own), "parameter 'weight'(.|\n)*'tied'"),
    "a module": (_set("head", lambda: nn.Linear(4, 4)), "'weight'(.|\n)*'head'"),
    "a block": (lambda model: model.blocks.__setitem__(2, Block()), "'scale'(.|\n)*'blocks.2'"),
    "all": (_set("blocks", lambda: nn.ModuleList(Block() for _ in range(3))), "'blocks.0'"),
    "by loading": (lambda model: model.load_state_dict(Model().state_dict(), assign=True), "parameter '"),
    "a wrapped block": (
        lambda model: model.blocks.__setitem__(1, Adapted(model.blocks[1])),
        "'1', a Block, of the model is another(.|\n)*, of class Adapted,(.|\n)*'blocks'",
    ),
    "a wrapped module": (
        lambda model: setattr(model, "head", Adapted(model.head)),
        "'head', a Linear, of the model(.|\n)*, of class Adapted,",
    ),
    "one of a class of the same name": (lambda model: setattr(model, "head", _LINEAR(model.head)), "'head', a Linear, of the model"),
    "none any more": (_set("blocks.1", nn.Identity), "'1', a Block, of the model(.|\n)*, of class Identity,"),
    "a shorter list": (_set("steps", lambda: nn.Sequential(nn.Linear(4, 4))), "'weight'(.|\n)*'steps.0'"),
    "a longer list": (lambda model: model.steps.append(nn.ReLU()), "'3', which was added,(.|\n)*'steps', a Sequential"),
    "one without parameters": (_set("blocks.2.act", nn.Tanh), "'act', a ReLU, of the model(.|\n)*'blocks.2', a Block"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_was_replaced_is_named_in_each_call_until_it_is_back(name: str, tmp_path: Path) -> None:
    model = Model()
    pipe = cut(model)
    before = {path: dict(owner._modules) for path, owner in model.named_modules()}
    parameters = {path: dict(owner._parameters) for path, owner in model.named_modules()}
    replace, message = REPLACED[name]
    replace(model)
    for call in (lambda: pipe(X), lambda: pipe.module()(X), lambda: pipe.save(tmp_path / "pipe")):
        with pytest.raises(ChangedError, match=message) as raised:
            call()
        assert "load_state_dict without assign=True" in str(raised.value)
    assert not [*tmp_path.iterdir()]
    for path, children in before.items():
        modules: Any = model.get_submodule(path)._modules
        for key in modules.keys() - children.keys():
            del modules[key]
        for key, child in children.items():
            setattr(model.get_submodule(path), key, child)
    for path, own in parameters.items():
        for key, parameter in own.items():
            setattr(model.get_submodule(path), key, parameter)
    pipe.eval()
    assert torch.equal(pipe(X)[0], model.eval()(X))


def test_a_block_that_is_kept_whole_is_noticed_and_its_parameters_are_its_own() -> None:
    model = Model()
    pipe = cut(model, leaf_modules=["blocks.1"])
    model.blocks[1].linear.load_state_dict(nn.Linear(4, 4).state_dict())
    pipe(X)
    kept, model.blocks[1] = model.blocks[1], Block()
    with pytest.raises(ChangedError, match="'1', a Block, of the model is another one"):
        pipe(X)
    model.blocks[1] = kept
    pipe(X)


def _prune(model: Any) -> None:
    del model.blocks[2].linear.weight
    model.head.bias = None
    del model.blocks[0]


QUIET: dict[str, Callable[[Any], Any]] = {
    "loading in place": lambda model: model.load_state_dict(Model().state_dict()),
    "another dtype": lambda model: model.half().float(),
    "another device": lambda model: model.to("cpu"),
    "freed on meta": lambda model: model.to("meta"),
    "freed": _prune,
    "freed blocks": _set("blocks", lambda: None),
    "no blocks": _set("blocks", nn.ModuleList),
    "an equal list": lambda model: setattr(model, "blocks", nn.ModuleList([*model.blocks])),
    "more": lambda model: model.head.register_parameter("more", _own()),
    "unused": _set("blocks.1.loss", nn.L1Loss),
    "compiled in place": lambda model: model.compile(),
    "compiled blocks": lambda model: model.blocks.__setitem__(1, torch.compile(model.blocks[1])),
    "compiled twice over": lambda model: setattr(model, "head", checkpoint_wrapper(torch.compile(model.head))),
    "checkpointed blocks": lambda model: model.blocks.__setitem__(1, checkpoint_wrapper(model.blocks[1])),
    "hooked": lambda model: model.blocks[1].register_forward_hook(lambda *_: None),
    "a compiled activation": lambda model: setattr(model.blocks[1], "act", torch.compile(model.blocks[1].act)),
    "no gradients": lambda model: model.requires_grad_(False),
    "parametrized": lambda model: parametrize.register_parametrization(model.head, "bias", nn.Identity()),
    "a buffer": lambda model: model.blocks[1].norm.register_buffer("running_mean", torch.zeros(4)),
    "a call": lambda model: model(X),
}


@pytest.mark.parametrize("name", QUIET)
def test_what_is_no_replacement_raises_nothing(name: str) -> None:
    model = Model()
    pipe = cut(model)
    QUIET[name](model)
    pipe(X)


def test_a_parameter_that_the_stages_were_given_too_is_theirs() -> None:
    model = Model().eval()
    pipe = cut(model)
    weight = _own()
    pipe.get_submodule("head").weight = model.head.weight = weight
    pipe.get_submodule("tied").weight = model.tied.weight = weight
    assert torch.equal(pipe(X)[0], model(X))
    model.tied.weight = _own()
    with pytest.raises(ChangedError):
        pipe(X)


def test_pipes_that_know_no_model_or_shall_not_ask_it_go_on(tmp_path: Path) -> None:
    model = Model().eval()
    pipe = cut(model)
    pipe.save(tmp_path / "pipe")
    expected = pipe(X)[0]
    copies = [deepcopy(pipe), pickle.loads(pickle.dumps(pipe)), load(tmp_path / "pipe")]
    model.head.weight = _own()
    for one in (*copies, pipe.keep_as_cut()):
        assert torch.equal(one(X)[0], expected)


def test_a_pipe_keeps_nothing_of_a_model_alive() -> None:
    model = Model()
    pipe = cut(model)
    parts = [weakref.ref(part) for part in model.modules()]
    deleted = weakref.ref(model.blocks[0].linear)
    model.blocks[0].linear = None
    gc.collect()
    assert deleted() is None
    pipe(X)
    del model
    gc.collect()
    assert not [part for part in parts if part() is not None]
    pipe(X)


def test_a_model_on_meta_may_become_real_beside_its_pipe() -> None:
    with torch.device("meta"):
        model = Model()
    pipe = pipeline(model, (X.to("meta"),), split_spec={"blocks.1": SplitPoint.BEGINNING}, leaf_modules=["blocks.2"], check=None)
    real = Model()
    pipe.materialize(range(2), values=real.state_dict())
    pipe(X)
    model.load_state_dict(real.state_dict(), assign=True)
    pipe(X)


def test_a_lazy_parameter_that_the_trace_made_is_the_one_that_was_cut() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 4))
    model(X)
    pipe = pipeline(model, (X,), split_spec={"1": SplitPoint.BEGINNING})
    pipe(X)
    model[0].weight = _own()
    with pytest.raises(ChangedError):
        pipe(X)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_ranks_refuse_a_replaced_parameter_together(tmp_path: Path) -> None:
    assert on_ranks(2, _replace, tmp_path) == ["ok", "ok"]


def _replace(folder: Path) -> str:
    model: Any = lora()
    pipe = pipeline(model, (), inputs(SAMPLES), split_policy=equal_ops(2), check=None)
    driver = Driver(pipe, "1F1B", 2, loss_of)
    optimizer = optimizer_of(driver)
    train(driver, optimizer, range(1))
    owner = next(part for path, part in model.named_modules() if path.endswith("lora_A.default"))
    before, owner.weight = owner.weight, nn.Parameter(owner.weight.detach().clone())
    with pytest.raises(ChangedError, match="parameter 'weight' of the model is another one"):
        train(driver, optimizer, range(1))
    owner.weight = before
    train(driver, optimizer, range(1, 2))
    model.to("meta")
    train(driver, optimizer, range(2, 3))
    return "ok"
