"""A pipe on disk: what comes back is what was saved, and what was tampered with is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from compare import Near, differences, observe
from fuzz.judge import programs
from fuzz.plans import ModelPlan, build, inputs, options
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree

import stagecut
from stagecut import Driver, Pipe, SplitPoint, StagecutError, pipe_split, pipeline
from stagecut.backend.files.manifest import FORMAT, call_form
from stagecut.backend.files.saved import LONGEST
from stagecut.backend.files.untrusted import SavedError, digest_of
from stagecut.backend.stages.modules import find
from stagecut.ir.run.call import CallSpec
from stagecut.ir.text.parser import parse_literal
from stagecut.ir.text.printer import text

X = torch.linspace(-1, 1, 24).reshape(4, 6)
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Pair = namedtuple("Pair", "first second")
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text()
NOTHING = _pytree.tree_structure(())


@dataclass
class Result:
    """An output of a class of the user's."""

    value: torch.Tensor
    extra: list[torch.Tensor]


torch.export.register_dataclass(Result)


class Cut(nn.Module):
    """Two linear layers around a split; what they make goes through `wrap`."""

    def __init__(self, wrap: Callable[..., Any] = lambda x, y: x + y) -> None:
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(6, 6), nn.Linear(6, 6), wrap

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.relu(self.a(x))
        pipe_split()
        return self.wrap(self.b(y), y)


class Tied(nn.Module):
    """An embedding that is its own head, with dropout and a layer norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.norm, self.drop, self.head = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Dropout(0.2), nn.Linear(6, 9, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        pipe_split()
        return self.head(self.drop(self.norm(x)))


class State(nn.Module):
    """Every kind of state: batch norm, buffers that are not persistent, complex, half, constants, a scalar, an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("scale", torch.rand(6), persistent=False)
        self.register_buffer("wave", torch.randn(6, dtype=torch.complex128))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("none", torch.empty(0, 6))
        self.low = nn.Parameter(torch.randn(6, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(6, 5).t())
        self.constant = torch.randn(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x) * self.scale + self.low.float()
        self.steps += 1
        pipe_split()
        y = x * self.wave.real.float() * self.frozen + self.constant
        return torch.cat([nn.functional.linear(y, self.turned), self.none[:, :5]]) + self.steps


class Keywords(nn.Module):
    """Arguments with defaults, by keyword, and nested."""

    def forward(self, x: torch.Tensor, scale: float = 2.0, *, parts: dict[str, Any], flag: bool = True) -> torch.Tensor:
        y = x * scale + parts["a"]
        pipe_split()
        return y - parts["b"][0] if flag else y


class Regions(nn.Module):
    """Grad modes and autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.a(x)
        pipe_split()
        with torch.autocast("cpu", torch.bfloat16):
            z = self.a(x)
        return y + z.float()


def gpt2() -> Call:
    """The one of transformers, tied, and with an output class of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8, use_cache=False)
    return GPT2LMHeadModel(config), (), {"input_ids": torch.arange(6).reshape(1, 6)}


MODELS: dict[str, Callable[[], Call]] = {
    "plain": lambda: (Cut(), (X,), {}),
    "tied": lambda: (Tied(), (torch.arange(8).reshape(2, 4),), {}),
    "state": lambda: (State(), (X,), {}),
    "keywords": lambda: (Keywords(), (X,), {"parts": {"a": X, "b": (X,)}, "flag": True}),
    "regions": lambda: (Regions(), (X,), {}),
    "dict": lambda: (Cut(lambda x, y: {"x": x, 3: [y, None], "t": (x,)}), (X,), {}),
    "ordered": lambda: (Cut(lambda x, y: OrderedDict(b=x, a=y)), (X,), {}),
    "dataclass": lambda: (Cut(lambda x, y: Result(x, [y])), (X,), {}),
    "named tuple": lambda: (Cut(lambda x, y: Pair(x, y)), (X,), {}),
    "return type": lambda: (Cut(lambda x, y: torch.max(x + y, dim=1)), (X,), {}),
    "lstm": lambda: (nn.Sequential(nn.LSTM(6, 5, batch_first=True)), (X.reshape(2, 2, 6),), {}),
    "conv": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last), (torch.randn(2, 3, 5, 5),), {}
    ),
    "gpt2": gpt2,
}  # fmt: skip


def cut(name: str) -> tuple[Pipe, tuple[Any, ...], dict[str, Any]]:
    """The model of that name, cut, with the call it was traced with."""
    torch.manual_seed(0)
    model, args, kwargs = MODELS[name]()
    return pipeline(model, args, kwargs, check=None), args, kwargs


def results(pipe: Pipe, args: Any, kwargs: Any) -> tuple[Any, list[torch.Tensor | None], dict[str, torch.Tensor]]:
    """What a call gives, the gradients, and the state afterwards."""
    torch.manual_seed(1)
    output = pipe.module()(*args, **kwargs)
    tensors = [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if tensors:
        sum(tensor.double().sum() for tensor in tensors).backward()  # type: ignore[union-attr]
    return output, [p.grad for p in pipe.parameters()], dict(pipe.named_buffers())


def same(one: Any, other: Any) -> None:
    """Both are alike: the same structure, each tensor bit for bit, with the same layout and the same wish for gradient."""
    first, spec = _pytree.tree_flatten(one)
    second, other_spec = _pytree.tree_flatten(other)
    assert spec == other_spec
    for a, b in zip(first, second, strict=True):
        if not isinstance(a, torch.Tensor):
            assert a == b
            continue
        assert (a.dtype, a.shape, a.stride(), a.requires_grad, type(a)) == (b.dtype, b.shape, b.stride(), b.requires_grad, type(b))
        assert torch.equal(a.detach().contiguous().reshape(-1).view(torch.uint8), b.detach().contiguous().reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_is_what_was_saved(name: str, tmp_path: Path) -> None:
    """Outputs, gradients, buffers, names, order, ties, text and code."""
    pipe, args, kwargs = cut(name)
    pipe.save(tmp_path / "saved")
    back = stagecut.load(tmp_path / "saved")
    assert text(back.program) == text(pipe.program)
    assert list(map(str, back.stages)) == list(map(str, pipe.stages))
    assert [s.input_names for s in back.stages] == [s.input_names for s in pipe.stages]
    assert list(back.state_dict()) == list(pipe.state_dict())
    same(dict(back.named_parameters(remove_duplicate=False)), dict(pipe.named_parameters(remove_duplicate=False)))
    assert [n for n, _ in back.named_parameters()] == [n for n, _ in pipe.named_parameters()]
    same(results(back, args, kwargs), results(pipe, args, kwargs))
    assert not list(tmp_path.glob(".*"))


class Talks(nn.Linear):
    """Prints what it is told to."""

    told = ""

    def extra_repr(self) -> str:
        return self.told


@pytest.mark.parametrize("told", ["two\nlines", "é漢" * LONGEST, "no \ud800 text"])
def test_what_a_module_prints_is_saved_as_far_as_a_file_can_hold_it(told: str, tmp_path: Path) -> None:
    lin = Talks(4, 4)
    lin.told = told
    pipeline(nn.Sequential(lin), (torch.randn(2, 4),)).save(tmp_path / "saved")
    kept = stagecut.load_stage(tmp_path / "saved", 0).get_submodule("0").extra_repr()
    assert kept == told.replace("\ud800", "?")[: len(kept)]
    assert len(kept) > min(len(told), LONGEST // 3) - 1
    assert len(kept.encode()) <= LONGEST


def test_a_pipe_that_was_saved_without_what_its_modules_print_is_loaded(tmp_path: Path) -> None:
    """As those of 0.2.0 are."""
    pipeline(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),)).save(tmp_path / "saved")
    path = tmp_path / "saved" / "manifest.json"
    manifest = json.loads(path.read_text())
    for module in manifest["modules"].values():
        module.pop("described", None)
    path.write_text(json.dumps(manifest))
    assert str(stagecut.load_stage(tmp_path / "saved", 0)) == "Sequential(\n  (0): Linear()\n)"


@pytest.mark.filterwarnings("ignore:.*chooses by mode in Python")
@pytest.mark.parametrize("name", ["tied", "state", "gpt2"])
def test_stage_is_loaded_alone(name: str, tmp_path: Path) -> None:
    """Only its own files are read, and it computes what the stage of the pipe does."""
    pipe, args, kwargs = cut(name)
    pipe.eval()
    pipe.save(tmp_path / "saved")
    for index in range(1, pipe.num_stages):
        os.remove(tmp_path / "saved" / f"stage-{index}.safetensors")
    stage = stagecut.load_stage(tmp_path / "saved", 0)
    inputs = dict(zip(pipe.program.inputs, pipe.flatten(args, kwargs), strict=True))
    flat = [inputs[value] for value in pipe.program.stages[0].inputs]
    same(dict(stage.state_dict()), dict(pipe.stages[0].state_dict()))
    assert {n: m.training for n, m in stage.named_modules()} == {n: m.training for n, m in pipe.stages[0].named_modules()}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        ours = stage(*flat)
        torch.manual_seed(2)
        same(ours, pipe.stages[0](*flat))


@given(plan=programs(graphs=0.25))
@settings(max_examples=8)
def test_random_models_come_back(plan: ModelPlan, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the fuzzer draws, unless it cannot be cut, or is code that a file cannot hold."""
    args, kwargs = inputs(plan)
    folder = tmp_path_factory.mktemp("random") / "saved"
    try:
        pipe = pipeline(build(plan), args, kwargs, **options(plan))
        pipe.save(folder)
    except StagecutError:
        reject()
    expected, found = (observe(one.module(), inputs(plan)) for one in (pipe, stagecut.load(folder)))
    assert not differences(expected, found, Near(gradients=0.0))


def test_modes_are_kept(tmp_path: Path) -> None:
    """Those of now, and those of the trace, which a warning of train() needs."""
    pipe, args, kwargs = cut("tied")
    pipe.eval()
    pipe.save(tmp_path / "saved")
    back = stagecut.load(tmp_path / "saved")
    assert not any(m.training for m in back.modules())
    same(back(*args), pipe(*args, **kwargs))
    assert all(m.training for m in back.train().modules())


def test_sizes_vary_as_they_did(tmp_path: Path) -> None:
    """Ranges and expressions over sizes are kept."""
    batch = torch.export.Dim("batch", min=2, max=16)
    pipe = pipeline(Cut(), (X,), dynamic_shapes=({0: batch},))
    pipe.save(tmp_path / "saved")
    back = stagecut.load(tmp_path / "saved")
    wide = torch.randn(7, 6)
    same(back(wide), pipe(wide))
    with pytest.raises(StagecutError, match="traced were 2 to 16"):
        back(torch.randn(17, 6))


def test_one_tensor_stays_one(tmp_path: Path) -> None:
    """Tied over stages, though each stage has a file of its own."""
    pipe, _, _ = cut("tied")
    pipe.save(tmp_path / "saved")
    back = stagecut.load(tmp_path / "saved")
    assert back.stages[0].wte.weight is back.stages[1].head.weight


def test_buffers_that_are_not_persistent_stay_so(tmp_path: Path) -> None:
    pipe, _, _ = cut("state")
    pipe.save(tmp_path / "saved")
    back = stagecut.load(tmp_path / "saved")
    assert "scale" not in back.state_dict()
    assert "constant" not in dict(back.named_buffers())
    same(dict(back.named_buffers())["scale"], dict(pipe.named_buffers())["scale"])


def test_each_rank_saves_its_own_stages(tmp_path: Path) -> None:
    """The rest is on meta; the folder is whole when all have saved."""
    pipe, args, kwargs = cut("tied")
    values = dict(pipe.named_parameters())
    with torch.device("meta"):
        model = Tied()
    for index in (1, 0):
        mine = pipeline(model, (torch.empty(2, 4, dtype=torch.int64, device="meta"),))
        mine.materialize(index, values=values)
        with pytest.raises(StagecutError, match="meta"):
            mine.save(tmp_path / "whole")
        mine.save(tmp_path / "saved", stages=[index])
        if index:
            with pytest.raises(SavedError, match=r"stage 0 is not there"):
                stagecut.load(tmp_path / "saved")
    same(results(stagecut.load(tmp_path / "saved"), args, kwargs), results(pipe, args, kwargs))
    with pytest.raises(SavedError, match=r"stage 1 is in .* already"):
        pipe.save(tmp_path / "saved", stages=[1])
    assert not (tmp_path / "whole").exists()
    assert not list(tmp_path.glob(".*"))


def test_ranks_save_at_once_load_their_own_and_train(tmp_path: Path) -> None:
    """The first to come writes what is alike; the loss and the gradients are those of the unsplit model."""
    assert on_ranks(2, _train_loaded, tmp_path / "saved") == ["ok", "ok"]


def _train_loaded(folder: Path) -> str:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Tied().eval()
    ids = torch.arange(8).reshape(2, 4)
    pipeline(model, (ids[:1],)).save(folder, stages=[rank])
    dist.barrier()
    back = stagecut.load(folder, stages=[rank])
    driver = Driver(back, "GPipe", n_microbatches=2, loss_fn=lambda out, target: 2 * out.square().sum())
    driver.step(ids, target=torch.zeros(2))
    driver.sync_shared_gradients()
    model(ids).square().sum().backward()
    torch.testing.assert_close(find(back.stages[rank], "head.weight" if rank else "wte.weight").grad, model.wte.weight.grad)
    return "ok"


def test_some_stages_are_loaded_into_a_pipe(tmp_path: Path) -> None:
    """The others are on meta, as after a cut on meta."""
    pipe, _, _ = cut("plain")
    pipe.save(tmp_path / "saved")
    os.remove(tmp_path / "saved" / "stage-0.safetensors")
    back = stagecut.load(tmp_path / "saved", [1])
    assert {name for name, tensor in back.state_dict().items() if not tensor.is_meta} == {"b.weight", "b.bias"}
    assert list(back.state_dict()) == list(pipe.state_dict())


def test_loaded_is_saved_again(tmp_path: Path) -> None:
    """Byte for byte."""
    pipe, _, _ = cut("state")
    pipe.save(tmp_path / "one")
    stagecut.load(tmp_path / "one").save(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# --- what cannot be saved -----------------------------------------------------------------------------------


def test_module_kept_whole_is_refused(tmp_path: Path) -> None:
    pipe = pipeline(Cut(), (X,), leaf_modules=["b"])
    with pytest.raises(SavedError, match=r"code of yours that a file cannot hold: 'b'"):
        pipe.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_overlapping_parameters_are_refused(tmp_path: Path) -> None:
    model = Cut()
    model.b.bias = nn.Parameter(model.a.bias.detach()[:])
    with pytest.raises(SavedError, match=r"'a.bias' and 'b.bias' lie in the same memory"):
        pipeline(model, (X,)).save(tmp_path / "saved")


def test_parameters_side_by_side_in_one_storage_are_saved(tmp_path: Path) -> None:
    """As those of an LSTM on a GPU are."""
    model, flat = Cut(), torch.randn(12)
    model.a.bias, model.b.bias = nn.Parameter(flat[:6]), nn.Parameter(flat[6:])
    pipe = pipeline(model, (X,))
    pipe.save(tmp_path / "saved")
    same(results(stagecut.load(tmp_path / "saved"), (X,), {}), results(pipe, (X,), {}))


SPREAD: dict[str, Callable[[], torch.Tensor]] = {
    "expanded": lambda: torch.arange(6.0).expand(4, 6),
    "gaps": lambda: torch.arange(48.0).reshape(4, 12)[:, ::2],
    "padded rows": lambda: torch.arange(32.0).reshape(4, 8)[:, :6],
    "windows": lambda: torch.arange(9, dtype=torch.bfloat16).as_strided((4, 6), (1, 1)),
    "far": lambda: torch.zeros(6, 2**19)[:, 0],
}


@pytest.mark.parametrize("name", SPREAD)
def test_tensor_that_is_not_dense_is_refused(name: str, tmp_path: Path) -> None:
    """A file holds elements, not places: what shares a place or has gaps would come back as something else. The hint helps."""

    class Spread(Cut):
        def __init__(self, spread: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("spread", spread)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.spread.reshape(-1)[0].add_(1)
            return super().forward(x + self.spread)  # type: ignore[no-any-return]

    with pytest.raises(SavedError, match=r"(?s)'spread' has the strides \[.*make it \.contiguous\(\) in __init__"):
        pipeline(Spread(SPREAD[name]()), (X,)).save(tmp_path / "saved")
    pipe = pipeline(Spread(SPREAD[name]().contiguous()), (X,))
    pipe.save(tmp_path / "saved")
    back = stagecut.load(tmp_path / "saved")
    for _ in range(2):
        assert torch.equal(back(X)[0], pipe(X)[0])


def test_strides_of_dense_tensors_are_kept(tmp_path: Path) -> None:
    """In any order of dims, and on meta."""

    class Permuted(Cut):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turned", torch.arange(24.0).reshape(6, 4).t())
            self.register_buffer("deep", torch.arange(24.0).reshape(2, 3, 1, 4).permute(3, 1, 2, 0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.turned + self.deep.sum())  # type: ignore[no-any-return]

    pipe = pipeline(Permuted(), (X,))
    pipe.save(tmp_path / "saved")
    for back in (stagecut.load(tmp_path / "saved"), stagecut.load(tmp_path / "saved", device="meta")):
        assert {n: b.stride() for n, b in back.named_buffers()} == {n: b.stride() for n, b in pipe.named_buffers()}
    same(results(stagecut.load(tmp_path / "saved"), (X,), {}), results(pipe, (X,), {}))


def test_as_strided_on_a_part_of_a_tensor_is_refused(tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("part", torch.arange(12.0)[:6])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + self.part.as_strided((6,), (2,))
            pipe_split()
            return y * 2

    with pytest.raises(SavedError, match=r"'part' is a part of a larger tensor, and as_strided"):
        pipeline(Around(), (X,)).save(tmp_path / "saved")


def test_tied_weights_load_on_meta(tmp_path: Path) -> None:
    pipeline(Tied(), (torch.arange(8).reshape(2, 4),)).save(tmp_path / "saved")
    back = stagecut.load(tmp_path / "saved", device="meta")
    assert all(p.is_meta for p in back.parameters())
    assert back.stages[0].get_parameter("wte.weight") is back.stages[1].get_parameter("head.weight")


def test_a_partly_loaded_pipe_says_so_when_called(folder: Path) -> None:
    pipe = stagecut.load(folder, [1])
    for call in (pipe, pipe.module()):
        with pytest.raises(StagecutError, match=r"(?s)stage 0 is on the meta device: 'a.weight' has no values.*load that stage as well"):
            call(X)
    whole = stagecut.load(folder, device="meta")
    assert whole(X.to("meta"))[0].is_meta


@pytest.mark.parametrize("name", ["", ".", "..", "/", None])
def test_a_save_without_a_folder_is_refused(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SavedError, match=r"a folder of its own|None is no folder"):
        pipeline(Cut(), (X,)).save(name)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (1, r"stages=1 is no list of stages"), ("1", r"stages='1' is no list of stages"), (["1"], r"'1' is no stage"),
        ([1.0], r"1.0 is no stage"), ([2], r"there is no stage 2, there are 2"), ([-1], r"there is no stage -1"),
    ],
)  # fmt: skip
def test_stages_that_are_none_are_refused(stages: Any, says: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SavedError, match=says):
        stagecut.load(folder).save(tmp_path / "other", stages=stages)
    with pytest.raises(SavedError, match=says):
        stagecut.load(folder, stages)


@pytest.mark.parametrize(("index", "says"), [("1", r"'1' is no stage"), (None, r"None is no stage"), (2, r"there is no stage 2")])
def test_load_stage_wants_a_number(index: Any, says: str, folder: Path) -> None:
    with pytest.raises(SavedError, match=says):
        stagecut.load_stage(folder, index)


def test_tensor_cast_after_the_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SavedError, match="traced was f32"):
        pipeline(Cut(), (X,)).half().save(tmp_path / "saved")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    pipe, _, _ = cut("plain")
    pipe.save(tmp_path / "saved")
    with pytest.raises(SavedError, match="is there already"):
        pipe.save(tmp_path / "saved")
    pipeline(Tied(), (torch.arange(8).reshape(2, 4),)).save(tmp_path / "other", [0])
    with pytest.raises(SavedError, match="holds another program"):
        pipe.save(tmp_path / "other", [1])
    assert not list(tmp_path.glob(".*"))


def test_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SavedError, match="cannot be written"):
        cut("plain")[0].save(tmp_path / "file" / "saved")


# --- tampering ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved pipe of two stages with a dict as its output."""
    cut("dict")[0].save(tmp_path / "saved")
    return tmp_path / "saved"


def refused(folder: Path) -> str:
    """The message with which `folder` is refused, by every way to load it."""
    with pytest.raises(StagecutError) as caught:
        stagecut.load(folder)
    with pytest.raises(StagecutError):
        stagecut.load_stage(folder, 0)
    return str(caught.value)


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """The JSON file with `change` made."""
    data = json.loads(file.read_text(encoding="utf-8"))
    replaced = change(data)
    file.write_text(json.dumps(data if replaced is None else replaced), encoding="utf-8")


def retell(folder: Path, index: int = 0) -> None:
    """The digest of a stage's tensors is right again, as a stranger would see to."""
    edit(folder / f"stage-{index}.json", lambda d: d.update(sha256=digest_of(folder / f"stage-{index}.safetensors")))


FILES = ("program.ir", "manifest.json", "stage-0.json", "stage-0.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_refused(name: str, folder: Path) -> None:
    """One bit, a lost end, no file, a link, a folder, a pipe, nothing in it."""
    path = folder / name
    content = path.read_bytes()
    for damaged in (b"\xff" + content[1:], content[:-2], content[: len(content) // 2], b"", content + b"\0"):
        path.write_bytes(damaged)
        refused(folder)
    os.remove(path)
    refused(folder)
    outside = folder.parent / "outside"
    outside.write_bytes(content)
    path.symlink_to(outside)
    assert "link" in refused(folder)
    os.remove(path)
    path.mkdir()
    refused(folder)
    path.rmdir()
    os.mkfifo(path)
    assert "no regular file" in refused(folder)


@pytest.mark.parametrize(("version", "hint"), [(FORMAT + 1, "update"), (FORMAT - 1, "cut the model and save it again")])
@pytest.mark.parametrize("name", ["manifest.json", "stage-0.json"])
def test_other_format_is_refused(name: str, version: int, hint: str, folder: Path) -> None:
    """Whatever else the file holds: it is not damaged."""
    edit(folder / name, lambda d: {"format": version, "something": "new"})
    message = refused(folder)
    assert f"format {version}, this stagecut" in message
    assert hint in message


@pytest.mark.parametrize("name", ["manifest.json", "stage-0.json"])
def test_json_of_another_shape_is_refused(name: str, folder: Path) -> None:
    """Each key gone, each value of another kind, one more key, and what JSON does not have."""
    path = folder / name
    good = json.loads(path.read_text(encoding="utf-8"))
    for key in good:
        for bad in (None, 7, "x", [7], {"a": {"b": 7}}, [None], 1.5):
            if bad == good[key] or (key, bad) == ("call", None) or (key == "stagecut" and bad == "x") or (key == "torch" and bad == "x"):
                continue
            path.write_text(json.dumps(good | {key: bad}), encoding="utf-8")
            refused(folder)
        path.write_text(json.dumps({k: v for k, v in good.items() if k != key}), encoding="utf-8")
        refused(folder)
    for raw in (
        json.dumps(good | {"file": "../x"}),
        "[" * 100_000,
        "7",
        "null",
        '{"format": NaN}',
        '{"format": 2, "format": 2}',
        "9" * 10_000,
    ):
        path.write_text(raw, encoding="utf-8")
        refused(folder)


def test_manifest_of_another_program_is_refused(folder: Path) -> None:
    program = (folder / "program.ir").read_text(encoding="utf-8").replace("aten.relu.default", "aten.neg.default")
    (folder / "program.ir").write_text(program, encoding="utf-8")
    assert "sha256 differs" in refused(folder)
    edit(folder / "manifest.json", lambda d: d["program"].update(sha256=digest_of(folder / "program.ir")))
    assert "not the program" in refused(folder)


def test_stage_of_another_program_is_refused(folder: Path) -> None:
    edit(folder / "stage-0.json", lambda d: d.update(fingerprint="0" * 64))
    assert "of another program" in refused(folder)


def test_stages_that_disagree_are_refused(tmp_path: Path) -> None:
    """A tied tensor has one value."""
    pipe, _, _ = cut("tied")
    pipe.save(tmp_path / "saved")
    with torch.no_grad():
        pipe.stages[0].wte.weight.add_(1)
    pipe.save(tmp_path / "later")
    for name in ("stage-1.json", "stage-1.safetensors"):
        shutil.copy(tmp_path / "later" / name, tmp_path / "saved" / name)
    with pytest.raises(SavedError, match=r"different values for 'wte.weight'"):
        stagecut.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a.bias"), "'a.bias' is missing"),
        (lambda t: t.update({"__class__": torch.ones(1)}), "'__class__' is no tensor of this stage"),
        (lambda t: t.update({"a.bias": torch.ones(7)}), "the program wants f32"),
        (lambda t: t.update({"a.bias": torch.ones(6, dtype=torch.int32)}), "the program wants f32"),
        (lambda t: t.update({"a.bias": torch.ones(6, 1)}), "the program wants f32"),
    ],
)
def test_other_tensors_are_refused(change: Callable[[dict[str, Any]], Any], message: str, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "stage-0.safetensors")
    change(tensors)
    save_file(tensors, folder / "stage-0.safetensors")
    retell(folder)
    assert message in refused(folder)


@pytest.mark.parametrize(
    "header",
    [b"{", b"[]", b'{"a.bias": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 24]}}', b"[" * 100_000, b"{}"],
)
def test_damaged_header_is_refused(header: bytes, folder: Path) -> None:
    (folder / "stage-0.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    retell(folder)
    refused(folder)


def test_huge_header_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / "stage-0.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 40))
    retell(folder)
    assert "header" in refused(folder)


@pytest.mark.parametrize(
    "item",
    [
        {"requires_grad": True, "strides": [0, 0]}, {"requires_grad": True, "strides": [1, 1]}, {"requires_grad": True, "strides": [-6, 1]},
        {"requires_grad": True, "strides": [1 << 61, 1]}, {"requires_grad": True, "strides": [6]}, {"requires_grad": 1, "strides": None},
    ],
)  # fmt: skip
def test_strides_that_no_tensor_has_are_refused(item: dict[str, Any], folder: Path) -> None:
    edit(folder / "stage-0.json", lambda d: d["tensors"].update({"a.weight": item}))
    refused(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("aten.relu.default", "os.system"), ("aten.relu.default", "aten.from_file.default"),
        ("aten.relu.default", "torch.ops.mine.f.default"),
        ("aten.relu.default", "extern.f"), ('aten.relu.default', 'module."b"'), ("@a.bias", "@a._forward_hooks"), ("@a.bias", "@a.forward"),
        ("phase=linked", "phase=traced"), ("f32[6]", "f32[s0]"), ("f32[6]", "f32[6000000000000000000000]"), ("f32[4,6]", 'f32[exec("")]'),
    ],
)  # fmt: skip
def test_program_of_a_stranger_is_refused(old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All digests are right, and so is the fingerprint."""
    source = (folder / "program.ir").read_text(encoding="utf-8").replace(old, new)
    (folder / "program.ir").write_text(source, encoding="utf-8")
    edit(folder / "manifest.json", lambda d: d["program"].update(sha256=digest_of(folder / "program.ir")))
    edit(folder / "manifest.json", lambda d: d.update(names=[n.replace(old[1:], new[1:]) for n in d["names"]]))
    for index in (0, 1):
        edit(folder / f"stage-{index}.json", lambda d: d.update(tensors={n.replace(old[1:], new[1:]): t for n, t in d["tensors"].items()}))
    monkeypatch.setattr(
        "stagecut.backend.files.saved.fingerprint",
        lambda program: json.loads((folder / "manifest.json").read_text())["program"]["fingerprint"],
    )
    refused(folder)


def test_operators_of_yours_are_asked_for(tmp_path: Path) -> None:
    """Loading a program of a stranger must not call whatever this process has registered."""
    with torch.library._scoped_library("stagecut_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("twice", lambda x: x * 2, "Meta")
        pipe = pipeline(Cut(lambda x, y: torch.ops.stagecut_test.twice(x.detach())), (X,))
        pipe.save(tmp_path / "saved")
        with pytest.raises(SavedError, match="stagecut_test"):
            stagecut.load(tmp_path / "saved")
        same(stagecut.load(tmp_path / "saved", ops=["stagecut_test"])(X), pipe(X))


# --- pytrees ----------------------------------------------------------------------------------------------------


def node(name: Any, context: Any, children: Any, **more: Any) -> dict[str, Any]:
    """A node of a structure as the manifest has it."""
    return {"name": name, "context": context, "children": children} | more


def outputs(folder: Path, form: Any) -> None:
    """The manifest says that the model returns `form`."""
    edit(folder / "manifest.json", lambda d: d["call"].update(outputs=form))


LEAVES: list[None] = [None, None, None, None]


@pytest.mark.parametrize(
    "form",
    [
        node("os.system", '"ls"', LEAVES), node("subprocess.Popen", "None", LEAVES),
        node("collections.defaultdict", '["list", ["a"]]', LEAVES),
        node("torch._higher_order_ops.flat_apply._ConstantFunction", "None", LEAVES), node("antigravity.X", "None", LEAVES),
        node("tuple", "[1]", LEAVES), node("dict", '["a", "a", "b", "c"]', LEAVES), node("dict", '["a"]', LEAVES),
        node("dict", '[[1], "a", "b", "c"]', LEAVES), node("dict", "None", LEAVES), node("tuple", "None", [None]),
        {"name": "tuple"}, {"name": "tuple", "children": None}, {"children": LEAVES}, node(7, "None", LEAVES), node("tuple", None, LEAVES),
        node("tuple", "None", LEAVES, more=1), "tuple", 7, {"a": 1}, [None, None, None], node("tuple", "None", "abcd"),
        node("os.stat_result", "None", LEAVES, fields=["a"]), node("x", "None", LEAVES, fields="y"),
        node("antigravity.Y", "None", LEAVES, fields=["a", "b", "c", "d"]), node("builtins.tuple", "None", LEAVES, fields=[]),
        node("", "None", LEAVES, fields=[]), node("test_saved.Pair", "None", LEAVES, fields=["first", "second"]),
    ],
)  # fmt: skip
def test_structure_that_is_none_is_refused(form: Any, folder: Path) -> None:
    outputs(folder, form)
    refused(folder)
    assert "antigravity" not in sys.modules


def test_deep_structure_is_refused(folder: Path) -> None:
    deep: Any = node("tuple", "None", LEAVES)
    for _ in range(200):
        deep = node("tuple", "None", [deep])
    outputs(folder, deep)
    assert "nested" in refused(folder)
    outputs(folder, node("dict", "[" * 200 + "]" * 200, LEAVES))
    assert "nested" in refused(folder)


@pytest.mark.parametrize(
    "literal",
    [
        "torch.float32",
        "slice(1, 2, 3)",
        "...",
        "%x",
        "@a.bias",
        "<0>",
        "mode(True)",
        "{torch.load: 1}",
        "1 2",
        "os",
        "",
        '"',
        "{(1, 2): 3}",
    ],
)
def test_literal_that_is_none_is_refused(literal: str, folder: Path) -> None:
    """A context and a default are read by the reader of IR text, which knows more than plain literals."""
    outputs(folder, node("tuple", literal, LEAVES))
    assert "literal" in refused(folder)
    outputs(folder, None)
    edit(folder / "manifest.json", lambda d: d["call"].update(parameters=[{"name": "x", "default": literal}]))
    refused(folder)


def test_class_must_be_imported_before(tmp_path: Path) -> None:
    """The error says which."""
    cut("dataclass")[0].save(tmp_path / "saved")
    edit(tmp_path / "saved" / "manifest.json", lambda d: d["call"]["outputs"].update(name="my.models.Result"))
    message = refused(tmp_path / "saved")
    assert "my.models.Result" in message
    assert "import" in message


def test_class_with_no_plain_context_is_refused_when_saved(tmp_path: Path) -> None:
    from collections import defaultdict

    with pytest.raises(SavedError, match=r"collections.defaultdict"):
        pipeline(Cut(lambda x, y: defaultdict(list, a=x)), (X,), check=None).save(tmp_path / "saved")


def test_default_that_is_no_literal_must_be_given(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, how: Any = X, limit: float = float("inf"), ends: Any = (1, 2 + 1j)) -> torch.Tensor:
            return x + how

    pipe = pipeline(Model(), (X, X))
    pipe.save(tmp_path / "saved")
    back = stagecut.load(tmp_path / "saved")
    same(back(X, X), pipe(X, X))
    assert back._call_spec is not None
    assert back._call_spec.parameters["limit"] == float("inf")
    assert back._call_spec.parameters["ends"] == (1, 2 + 1j)
    with pytest.raises(StagecutError, match="missing argument 'how'"):
        back(X)


@given(st.recursive(ATOMS, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(ATOMS, inner), max_leaves=8))
def test_plain_literals_come_back(literal: Any) -> None:
    """Every default of plain literals is the same after its text has been read, its classes too."""
    (parameter,) = call_form(CallSpec((), (), {"x": literal}, NOTHING, NOTHING)).parameters
    assert parameter.default is not None
    assert repr(parse_literal(parameter.default)) == repr(literal)


def test_name_that_no_file_can_hold_is_refused_when_saved(tmp_path: Path) -> None:
    """Python keeps half of a surrogate pair in a string, UTF-8 does not."""
    model = nn.Sequential(OrderedDict({"\ud800": nn.ReLU(), "a": nn.Linear(6, 6)}))
    with pytest.raises(SavedError, match="JSON"):
        pipeline(model, (X,)).save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_saving_without_msgspec_names_the_extra() -> None:
    """It is no dependency of the base, so `import stagecut` does without it."""
    code = "import sys; sys.modules['msgspec'] = None; import stagecut, stagecut.pipe; stagecut.load('.')"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "SavedError: msgspec is not installed" in result.stderr
    assert "pip install 'stagecut[safetensors]'" in result.stderr


def test_split_points_survive(tmp_path: Path) -> None:
    """A pipe cut by names, saved, loaded and pickled."""
    pipe = pipeline(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), (X,), split_spec={"1": SplitPoint.BEGINNING})
    pipe.save(tmp_path / "saved")
    assert stagecut.load(tmp_path / "saved").num_stages == 2


def test_example_of_the_docs_prints_what_it_says(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "SAVED.md").read_text(encoding="utf-8")
    source, printed = re.findall(r"```(?:python)?\n(import os\n.*?|\['manifest.*?)```", page, re.DOTALL)
    (tmp_path / "example.py").write_text(source, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run([sys.executable, "example.py"], capture_output=True, text=True, cwd=tmp_path, check=True, env=environment)
    assert result.stdout.strip() == printed.strip()
