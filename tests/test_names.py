"""A pipe under the model's names: everything nn.Module does by name."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from test_edge_state import NamesOfOurAttributes, NamesThatAreOurs
from test_pipe import Aliased, Busy, FourMlps, Skipping, Tied, X, Y
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from stagecut import Pipe, StagecutError, pipe_split, pipeline
from stagecut.ir.errors import UnknownNameError


class Deep(nn.Module):
    """A block that is cut in the middle, below a container that is cut too; a buffer of the block that both halves read."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.shift: torch.Tensor
        self.register_buffer("shift", torch.randn(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * self.scale + self.shift
        pipe_split()
        return self.second(x) * self.scale + self.shift  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "skipping": (lambda: Skipping(pipe_split), 2),
    "four": (lambda: FourMlps(pipe_split), 2),
    "aliased": (lambda: Aliased(pipe_split), 2),
    "tied": (Tied, 1),
    "deep": (Deep, 1),
    "busy": (lambda: Busy().eval(), 1),
}
every_model = pytest.mark.parametrize("name", MODELS)


def cut(name: str) -> tuple[nn.Module, Pipe, tuple[torch.Tensor, ...]]:
    make, count = MODELS[name]
    torch.manual_seed(2)
    model, args = make().double(), (X, Y)[:count]
    return model, pipeline(model, args), args


def names_of(module: nn.Module) -> dict[str, list[str]]:
    """All names nn.Module lists, in order, with and without duplicates."""
    found = {"state": list(module.state_dict())}
    for once in (True, False):
        found[f"parameters {once}"] = [name for name, _ in module.named_parameters(remove_duplicate=once)]
        found[f"buffers {once}"] = [name for name, _ in module.named_buffers(remove_duplicate=once)]
    return found


@every_model
@pytest.mark.parametrize("of", [lambda pipe: pipe, lambda pipe: pipe.module()], ids=["pipe", "module"])
def test_every_name_it_lists_is_one_that_it_finds(name: str, of: Callable[[Pipe], nn.Module]) -> None:
    """The same names as the model's, for the same tensors; modules too."""
    model, pipe, _ = cut(name)
    ours = of(pipe)
    assert names_of(ours) == names_of(model)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        assert ours.get_parameter(path) is parameter
    for path, buffer in model.named_buffers(remove_duplicate=False):
        assert ours.get_buffer(path) is buffer
    paths = {path for path, _ in ours.named_modules(remove_duplicate=False)}
    assert paths <= {path for path, _ in model.named_modules(remove_duplicate=False)}
    for path in paths - {""}:
        assert dict(ours.get_submodule(path).named_parameters()).keys() == dict(model.get_submodule(path).named_parameters()).keys()
        assert ours.get_submodule(path).training is model.get_submodule(path).training
        assert ours.get_submodule(path).state_dict().keys() == model.get_submodule(path).state_dict().keys()


@every_model
def test_functional_call_swaps_in_every_stage(name: str) -> None:
    """By the model's names, tied ones by any of them; afterwards the pipe is as it was, and gradients reach what was given."""
    model, pipe, args = cut(name)
    before = pipe(*args)[0]
    values = {n: torch.randn_like(p).requires_grad_() for n, p in model.named_parameters()}
    values |= {n: torch.rand_like(b) for n, b in model.named_buffers() if b.is_floating_point()}
    twins = {n: v.detach().clone().requires_grad_(v.requires_grad) for n, v in values.items()}
    (found,) = functional_call(pipe, values, args)
    torch.testing.assert_close(found, functional_call(deepcopy(model), twins, args), rtol=0, atol=0)
    torch.testing.assert_close(functional_call(pipe.module(), values, args), found, rtol=0, atol=0)
    found.square().sum().backward()
    functional_call(deepcopy(model), twins, args).square().sum().backward()
    for n, value in values.items():
        torch.testing.assert_close(value.grad, twins[n].grad)
    torch.testing.assert_close(pipe(*args)[0], before, rtol=0, atol=0)
    own = dict(pipe.named_parameters(remove_duplicate=False)) | dict(pipe.named_buffers(remove_duplicate=False))
    torch.testing.assert_close(functional_call(pipe, own, args, strict=True)[0], before, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nothing"):
        functional_call(pipe, {"nothing": X}, args, strict=True)


@pytest.mark.parametrize("model", [NamesThatAreOurs(), NamesOfOurAttributes()], ids=lambda m: type(m).__name__)
def test_names_of_the_model_that_are_ours_are_found(model: nn.Module) -> None:
    """By the functions that take a name. As attributes they are ours on the pipe, and the model's on `pipe.module()`."""
    args = (torch.randn(3, 4, dtype=torch.float64),)
    pipe = pipeline(model, args)
    for path, parameter in model.named_parameters():
        assert pipe.get_parameter(path) is parameter
        assert pipe.get_submodule(path.rpartition(".")[0]).get_parameter("weight" if path.endswith("weight") else "bias") is not None
    values = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    if isinstance(model, NamesThatAreOurs):
        torch.testing.assert_close(functional_call(pipe.module(), values, args), functional_call(model, values, args), rtol=0, atol=0)


@every_model
def test_a_module_around_a_pipe_has_the_same_names(name: str) -> None:
    """It lists, saves and loads; what no stage knows is unexpected."""
    model, pipe, _ = cut(name)
    ours, theirs = nn.ModuleDict({"inner": pipe.module()}), nn.ModuleDict({"inner": model})
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    assert list(ours.state_dict()) == list(theirs.state_dict())
    other = {n: torch.randn_like(t) if t.is_floating_point() else t + 1 for n, t in theirs.state_dict().items()}
    for tied in [n for n in other if n.endswith("_again") or "_again." in n]:
        other[tied] = other[tied.replace("_again", "")]
    if name == "tied":
        other["inner.b.weight"] = other["inner.a.weight"]
    assert not any(ours.load_state_dict(other))
    for n, tensor in pipe.state_dict().items():
        assert torch.equal(tensor, other[f"inner.{n}"])
    first = next(iter(other))
    missing, unexpected = ours.load_state_dict({n: t for n, t in other.items() if n != first} | {"inner.no": X}, strict=False)
    assert (missing, unexpected) == ([first], ["inner.no"])


@every_model
def test_a_pipe_is_exported_and_averaged_as_its_model(name: str) -> None:
    """What else of torch goes by names."""
    model, pipe, args = cut(name)
    averaged = AveragedModel(pipe.module())
    averaged.update_parameters(pipe.module())
    assert [n for n, _ in averaged.module.named_parameters()] == [n for n, _ in model.named_parameters()]
    if name != "busy":
        exported = torch.export.export(pipe, args, strict=False)
        torch.testing.assert_close(exported.module()(*args)[0], pipe(*args)[0], rtol=0, atol=0)


def test_attributes_and_swaps_reach_every_stage() -> None:
    """A tensor that is set by its name is that of all stages."""
    model, pipe, args = cut("skipping")
    square = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
    pipe.square = square
    assert all(stage.get_parameter("square") is square for stage in pipe.stages[:2])
    model.square = square
    torch.testing.assert_close(pipe(*args)[0], model(*args), rtol=0, atol=0)
    assert pipe.inner is pipe.stages[1].get_submodule("inner")
    with pytest.raises(UnknownNameError, match="no 'other_one' here"):
        pipe.other_one = nn.Linear(2, 2)
    with pytest.raises(AttributeError, match=r"'inner', a Linear, has no parameter 'wight'"):
        pipe.get_parameter("inner.wight")
    with pytest.raises(AttributeError, match="no module 'iner'"):
        pipe.get_buffer("iner.shift")


def test_a_name_that_is_not_there_lists_the_nearest_in_the_module_around_it() -> None:
    pipe = pipeline(Blocks(), (torch.ones(2, 4),), stages=2, check=None)
    for ours in (pipe, pipe.module()):
        for path, words in (
            ("blocks.9.0", "'blocks', a ModuleList, has no module '9': known: '0', '1'"),
            ("blokcs", r"(Pipe|Blocks) has no module 'blokcs': did you mean 'blocks'\?"),
        ):
            with pytest.raises(AttributeError, match=f"^{words}$"):
                ours.get_submodule(path)
        with pytest.raises(AttributeError, match=r"^'blocks\.1', a Linear, has no parameter 'wieght': did you mean 'weight'\?$"):
            ours.get_parameter("blocks.1.wieght")
        with pytest.raises(AttributeError, match=r"has no parameter 'bias': known: 'weight'$"):
            ours.get_parameter("blocks.1.bias")
        assert ours.get_submodule("blocks")._get_name() == "ModuleList"
    with pytest.raises(AttributeError, match=r"^'blocks', a ModuleList, has no module '1': known: '0'$"):
        pipe.stages[0].get_submodule("blocks.1")


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x))  # type: ignore[no-any-return]


def test_a_module_of_several_stages_is_no_one_to_call() -> None:
    """It lists and switches; a hook would never run."""
    _, pipe, _ = cut("deep")
    block = pipe.get_submodule("blocks.1")
    assert [name for name, _ in block.named_parameters()] == ["scale", "first.weight", "first.bias", "second.weight", "second.bias"]
    assert not block.eval().training
    assert [stage.get_submodule("blocks.1").training for stage in pipe.stages[1:3]] == [False, False]
    for use in (block, block.register_forward_hook, block.register_full_backward_hook):
        with pytest.raises(StagecutError, match="several stages have a part"):
            use(X)


class Checkpointed(Deep):
    """Blocks that run again for the backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block.first, x, use_reentrant=False)
            pipe_split()
        return x


def test_a_swapped_tensor_is_read_in_a_checkpointed_region_too() -> None:
    model = Checkpointed().double()
    pipe = pipeline(model, (X,))
    values = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    torch.testing.assert_close(functional_call(pipe, values, (X,))[0], functional_call(model, values, (X,)), rtol=0, atol=0)
