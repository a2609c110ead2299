"""`pipe.module()` is to code that asks what the model is: its signature, by object and by class, and its data."""

from __future__ import annotations

import inspect
import pickle
import threading
import traceback
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster.models import _llama
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from stagecut import InputError, PipedModel, SplitPoint, load, pipeline
from stagecut.ir.run.call import ABSENT, CallSpec


@dataclass
class Config:
    width: int = 4
    names: tuple[str, ...] = ("a", "b")


class Doubled:
    """A descriptor that holds data."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __get__(self, owner: object, kind: type) -> int:
        return 2 * self.number


class Model(nn.Module):
    """Data of all kinds, and a forward with parameters of all kinds."""

    main_input_name = "x"
    doubled = Doubled(2)
    limits = {"most": 8}

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.config = Config()
        self.config_of_config = {"inner": [self.config]}
        self.dtype_wanted = torch.float64
        self.plan = None
        self.device = "elsewhere"  # ours says where the tensors are
        self._private = 1
        self.table = torch.ones(2)
        self.others = [nn.Linear(1, 1)]
        self.lock = threading.Lock()
        self.call = lambda: None

    def forward(self, x: torch.Tensor, /, scale: float = 2.0, *rest: Any, gain: float, **options: Any) -> torch.Tensor:
        return self.linear(x) * scale * gain  # type: ignore[no-any-return]


def cut(**options: Any) -> Any:
    model = Model()
    return pipeline(model, (torch.ones(2, 4, dtype=torch.float64),), {"gain": 0.5}, **options)


def kinds(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_the_signature_is_that_of_the_model_by_object_and_by_class() -> None:
    module = cut().module()
    assert kinds(module.forward) == kinds(Model().forward)
    assert kinds(type(module).forward)[1:] == kinds(Model().forward)
    assert isinstance(module, PipedModel)
    assert type(module).__name__ == "PipedModel"  # of a Model
    assert module._get_name() == "Model"
    x = torch.ones(2, 4, dtype=torch.float64)
    assert torch.equal(module(x, gain=0.5), Model.forward(module, x, gain=0.5))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'other'"):
        module(x, gain=0.5, other=1)


def test_data_of_the_model_and_of_its_class_are_attributes() -> None:
    model = Model()
    module = pipeline(model, (torch.ones(2, 4, dtype=torch.float64),), {"gain": 0.5}).module()
    assert module.config is model.config
    assert module.config_of_config is model.config_of_config
    assert (module.dtype_wanted, module.plan, module.main_input_name, module.limits) == (torch.float64, None, "x", {"most": 8})
    assert (module.device, module.dtype) == (torch.device("cpu"), torch.float64)
    for name in ("_private", "table", "others", "lock", "call", "doubled"):
        assert not hasattr(module, name)
    del model
    assert module.config == Config()


def test_copies_and_pickles_are_the_same() -> None:
    module = cut().module()
    for again in (deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert kinds(again.forward) == kinds(module.forward)
        assert again.config == module.config
        assert again.config is not module.config
        assert {name: tensor.tolist() for name, tensor in again.state_dict().items()} == {
            name: tensor.tolist() for name, tensor in module.state_dict().items()
        }
        again.mark = 1
        assert deepcopy(again).mark == 1
    assert not hasattr(deepcopy(module._pipe).module(), "config")


def test_where_only_names_are_known_the_signature_takes_them_as_a_call_does(tmp_path: Path) -> None:
    """Of a pipe that was loaded, of an ExportedProgram, and of a graph of fx. A loaded pipe has no data of the model."""
    pipe = cut()
    pipe.save(tmp_path / "saved")
    module = load(tmp_path / "saved").module()
    by_position, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    nothing = inspect.Parameter.empty
    assert kinds(module.forward) == [("x", by_position, nothing), ("scale", by_position, 2.0), ("gain", by_name, nothing)]
    assert not hasattr(module, "config")
    x = torch.ones(2, 4)
    exported = torch.export.export(nn.Linear(4, 4), (x,))
    assert kinds(pipeline(exported).module().forward) == [("input", by_position, nothing)]
    traced = fx.symbolic_trace(nn.Linear(4, 4))
    assert kinds(pipeline(traced, (x,)).module().forward) == [("input", by_position, nothing)]


def test_names_that_no_parameter_can_have_are_left_out() -> None:
    """A file may hold any names."""
    nothing = tree_flatten(())[1]
    spec = CallSpec(("x",), ("class", "a-b", "y"), {"x": 1, "z": ABSENT}, nothing, nothing)
    assert str(spec.signature) == "(x=1, *, z, y)"


def test_device_and_dtype_are_those_of_the_stages_that_are_real() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    pipe = pipeline(model, (torch.empty(2, 4, device="meta", dtype=torch.bfloat16),), split_spec={"1": SplitPoint.BEGINNING})
    assert pipe.module().device == torch.device("meta")
    pipe.initialize(1)
    assert (pipe.module().device, pipe.module().dtype) == (torch.device("cpu"), torch.bfloat16)
    empty = pipeline(nn.ReLU(), (torch.ones(2),)).module()
    assert (empty.device, empty.dtype) == (torch.device("cpu"), torch.float32)


def test_a_model_of_transformers_shows_what_its_trainer_reads() -> None:
    model: Any = _llama()
    ids = torch.randint(3, 32, (2, 6))
    module = pipeline(model, (), {"input_ids": ids, "labels": ids, "use_cache": False}).module()
    for name in ("config", "generation_config", "loss_type", "main_input_name"):
        assert getattr(module, name) is getattr(model, name)
    assert not hasattr(module, "generate")


@pytest.mark.parametrize("of", [lambda pipe: pipe, lambda pipe: pipe.module()], ids=["pipe", "module"])
def test_it_is_compiled_as_one_graph(of: Any) -> None:
    model, x = Model(), torch.ones(2, 4, dtype=torch.float64)
    module = of(pipeline(model, (x,), {"gain": 0.5}, split_spec={"linear": SplitPoint.END}))
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert all(map(torch.equal, tree_flatten(compiled(x, gain=0.5))[0], tree_flatten(module(x, gain=0.5))[0]))


@pytest.mark.parametrize("of", [lambda pipe: pipe, lambda pipe: pipe.module()], ids=["pipe", "module"])
def test_an_error_of_a_call_has_no_steps_between_it_and_the_user(of: Any) -> None:
    with pytest.raises(InputError) as caught:
        of(cut())(torch.ones(3, dtype=torch.float64), gain=0.5)
    assert [step.filename for step in traceback.extract_tb(caught.value.__traceback__)] == [__file__]
