"""A model on meta is cut, and each stage becomes real by itself: from safetensors, a distributed checkpoint, or an init function."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from cluster.models import _gpt, _llama
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from zoo.cuts import equal_ops

from stagecut import Driver, Pipe, StagecutError, pipe_split, pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


class Net(nn.Module):
    """Layers, a buffer that is in the state dict, and one that is not."""

    def __init__(self, width: int = 4, tie: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        if tie:
            self.second.weight = self.first.weight
        self.register_buffer("kept", torch.ones(width))
        self.register_buffer("scale", torch.arange(float(width)), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x)) + self.kept
        pipe_split()
        return self.second(x) * self.scale  # type: ignore[no-any-return]

    def reset(self) -> None:
        """The buffers, as __init__ makes them."""
        self.kept = torch.ones(4)
        self.scale = torch.arange(4.0)


def on_meta(make: Callable[[], nn.Module], stages: int = 0, **inputs: torch.Tensor | bool) -> tuple[nn.Module, Pipe]:
    """A model without values, and its pipe: in so many stages, or cut at its markers."""
    with torch.device("meta"):
        model = make()
    given = {name: item.to("meta") if isinstance(item, torch.Tensor) else item for name, item in inputs.items()}
    return model, pipeline(model, (), given, split_policy=equal_ops(stages) if stages else None, check=None)


def net(**options: Any) -> tuple[nn.Module, Pipe]:
    """`Net` on meta, cut at its marker."""
    return on_meta(lambda: Net(**options), x=torch.empty(2, 4))


def initialise(module: nn.Module) -> None:
    """What a user writes."""
    if isinstance(module, nn.Linear | nn.Embedding):
        module.reset_parameters()
    elif isinstance(module, Net):
        module.reset()


SCALE = {"scale": torch.arange(4.0)}


def test_each_stage_reads_what_it_needs_from_sharded_files(tmp_path: Path) -> None:
    reference = _llama()
    reference.save_pretrained(tmp_path, max_shard_size="4KB")  # type: ignore[operator]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    ids = torch.randint(3, 32, (2, 6))
    model, pipe = on_meta(_llama, 3, input_ids=ids, use_cache=False)
    assert pipe.num_stages == 3
    for stage in (2, 0, 1):
        needed = {index[name] for name in pipe.stages[stage].state_dict()}
        hidden = [file.rename(file.with_suffix(".away")) for file in tmp_path.glob("*.safetensors") if file.name not in needed]
        pipe.materialize(stage, tmp_path, init_fn=model._init_weights)  # type: ignore[arg-type]
        for file in hidden:
            file.rename(file.with_suffix(".safetensors"))
        assert [p.is_meta for s in pipe.stages for p in s.parameters()].count(False) > 0
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    torch.testing.assert_close(pipe.module()(input_ids=ids, use_cache=False).logits, reference(ids).logits, rtol=0, atol=0)


def test_tied_names_are_one_parameter_on_all_stages_of_a_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = _gpt()
    reference.save_pretrained(tmp_path)  # type: ignore[operator]
    ids = torch.randint(3, 32, (2, 6))
    _, pipe = on_meta(_gpt, 4, input_ids=ids, use_cache=False)
    pipe.materialize([0, 1, 2], tmp_path / "model.safetensors")
    pipe.materialize([3], tmp_path)
    first, last = pipe.stages[0].get_parameter("transformer.wte.weight"), pipe.stages[3].get_parameter("lm_head.weight")
    assert first is last
    assert first.requires_grad
    assert torch.equal(pipe.module()(input_ids=ids, use_cache=False).logits, reference(ids).logits)
    assert {n: p.requires_grad for n, p in pipe.named_parameters()} == {n: p.requires_grad for n, p in reference.named_parameters()}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_distributed_checkpoint_is_a_source(prefix: str, tmp_path: Path) -> None:
    reference = Net()
    state_dict_saver.save({prefix + name: tensor for name, tensor in reference.state_dict().items()}, checkpoint_id=tmp_path / "saved")
    _, pipe = net()
    pipe.materialize([0, 1], tmp_path / "saved", values=SCALE)
    x = torch.randn(2, 4)
    assert torch.equal(pipe(x)[0], reference(x))


def test_what_no_checkpoint_holds_is_asked_for_by_name(tmp_path: Path) -> None:
    reference = Net()
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    model, pipe = net()
    pipe.materialize(0, tmp_path)
    with pytest.raises(StagecutError, match=r"non-persistent buffers.*made on meta: 'scale'(?s:.)*values=\{name: tensor\}"):
        pipe.materialize(1, tmp_path)
    assert all(tensor.is_meta for tensor in pipe.stages[1].state_dict().values())
    pipe.materialize(1, tmp_path, init_fn=initialise)
    x = torch.randn(2, 4)
    assert torch.equal(pipe(x)[0], reference(x))
    del model


def test_values_draw_on_the_seed_and_the_name_not_on_the_cut() -> None:
    found = []
    ids = torch.randint(3, 32, (2, 6))
    for count, seed, indices in ((2, 0, (0, 1)), (3, 0, (0, 1, 2)), (3, 1, (2,))):
        state: dict[str, torch.Tensor] = {}
        for index in indices:  # a pipe each, as every rank has its own
            model, pipe = on_meta(_gpt, count, input_ids=ids, use_cache=False)
            pipe.materialize(index, init_fn=model._init_weights, seed=seed)  # type: ignore[arg-type]
            mine = pipe.stages[index].state_dict()
            assert all(torch.equal(tensor, state[name]) for name, tensor in mine.items() if name in state)
            state |= mine
            del model
        assert len(indices) == 1 or torch.equal(state["transformer.wte.weight"], state["lm_head.weight"])
        found.append(state)
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert not torch.equal(found[0]["lm_head.weight"], found[2]["lm_head.weight"])
    weights = found[0]
    assert weights["transformer.h.0.attn.c_proj.weight"].std() < 0.5 * weights["transformer.h.0.attn.c_attn.weight"].std()


def test_the_random_state_stays_as_it_was() -> None:
    model, pipe = net()
    before = torch.get_rng_state()
    pipe.materialize([0, 1], init_fn=initialise)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(pipe.stages[1].get_buffer("scale"), torch.arange(4.0))
    del model


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    state = Net().state_dict()
    model, pipe = net()

    def fails(match: str, saved: dict[str, torch.Tensor] | None = None, **options: Any) -> None:
        if saved is not None:
            save_file(saved, tmp_path / "model.safetensors")
        given: dict[str, Any] = {"values": SCALE, **options}
        with pytest.raises(StagecutError, match=match):
            pipe.materialize([0, 1], tmp_path, **given)
        assert all(tensor.is_meta for tensor in pipe.state_dict().values())

    fails("there is no checkpoint in")
    renamed = {name.replace("first.", "firs."): tensor for name, tensor in state.items()}
    fails("(?s)'first.weight' is not in the checkpoint.*did you mean 'firs.weight'", renamed)
    fails(r"(?s)'first.bias' has shape \[3\], that of the model \[4\].*model.safetensors", state | {"first.bias": torch.ones(3)})
    fails("(?s)'kept' is torch.float16, that of the model torch.float32.*cast=True", state | {"kept": torch.ones(4).half()})
    fails("values has 'scal'(?s:.)*did you mean 'scale'", state, values={"scal": torch.ones(4)})
    fails(r"'scale' has shape \[2\]", values={"scale": torch.ones(2)})
    with pytest.raises(StagecutError, match=r"nothing gives values to 'kept', 'first\.weight'"):
        pipe.materialize(0)
    with pytest.raises(StagecutError, match="init_fn gave no value to 'kept'"):
        pipe.materialize(0, init_fn=lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    fails("'model.safetensors' cannot be read")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(state, "one.safetensors")}))
    fails("'one.safetensors' is missing, though the index names it")
    save_file({name: state[name] for name in list(state)[:2]}, tmp_path / "one.safetensors")
    fails("is not where the index says")
    del model


def test_tensors_of_one_key_all_have_its_values(tmp_path: Path) -> None:
    """As where a part of a model begins as a copy of another."""
    _, pipe = net()
    state = Net().state_dict()
    save_file({name: tensor for name, tensor in state.items() if not name.startswith("second")}, tmp_path / "model.safetensors")
    pipe.materialize([0, 1], tmp_path, values=SCALE, rename=lambda name: name.replace("second", "first"))
    held = pipe.state_dict()
    for part in ("first", "second"):
        assert torch.equal(held[f"{part}.weight"], state["first.weight"])
        assert torch.equal(held[f"{part}.bias"], state["first.bias"])
    assert held["first.weight"] is not held["second.weight"]


def test_other_names_and_dtypes_are_taken_where_asked_for(tmp_path: Path) -> None:
    reference = Net()
    save_file({f"old.{name}": tensor.bfloat16() for name, tensor in reference.state_dict().items()}, tmp_path / "model.safetensors")
    _, pipe = net()
    pipe.materialize([0, 1], tmp_path, values=SCALE, cast=True, rename=lambda name: f"old.{name}")
    assert torch.equal(pipe.stages[0].get_parameter("first.weight"), reference.first.weight.bfloat16().float())


def test_values_come_before_the_checkpoint_and_real_tensors_stay(tmp_path: Path) -> None:
    save_file(Net().state_dict(), tmp_path / "model.safetensors")
    _, pipe = net()
    given = torch.randn(4)
    pipe.materialize([0, 1], tmp_path, values=SCALE | {"kept": given})
    assert torch.equal(pipe.stages[0].get_buffer("kept"), given)
    weight = pipe.stages[0].get_parameter("first.weight")
    pipe.materialize(0, tmp_path)
    assert pipe.stages[0].get_parameter("first.weight") is weight
    assert not torch.equal(pipe.stages[0].get_buffer("kept"), given)


def test_a_module_kept_whole_becomes_real() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(4, 4, batch_first=True)
            self.out = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, _ = self.cell(x)
            pipe_split()
            return self.out(x)  # type: ignore[no-any-return]

    with torch.device("meta"):
        model = Kept()
    pipe = pipeline(model, (torch.empty(2, 3, 4, device="meta"),), leaf_modules=["cell"], check=None)
    reference = Kept()
    pipe.materialize([0, 1], values={name: tensor.detach() for name, tensor in reference.state_dict().items()})
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(pipe(x)[0], reference(x))


def test_tensors_in_one_storage_are_refused() -> None:
    class Overlap(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", self.kept[:])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale + self.kept

    model, pipe = on_meta(Overlap, x=torch.empty(2, 4))
    with pytest.raises(StagecutError, match="'kept' and 'scale' lie in one storage"):
        pipe.materialize([0, 1], init_fn=initialise)
    del model


def test_numbers_that_forward_makes_a_tensor_of_are_known_on_meta() -> None:
    class Numbers(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 0 + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)

    model, pipe = on_meta(Numbers, x=torch.empty(2, 4))
    pipe.materialize([0, 1], init_fn=initialise)
    assert pipe(torch.randn(2, 4))[0].tolist() == [[1.0, 2.0, 3.0, 4.0]] * 2
    del model


def test_a_tensor_that_was_made_on_meta_has_lost_its_values() -> None:
    class Lost(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lost = torch.tensor([1.0, 2.0, 3.0, 4.0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.lost

    model, pipe = on_meta(Lost, x=torch.empty(2, 4))
    pipe.materialize(0, init_fn=initialise)
    with pytest.raises(StagecutError, match="init_fn gave no value to 'lost'"):
        pipe.materialize(1, init_fn=initialise)
    pipe.materialize(1, init_fn=initialise, values={"lost": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    assert not pipe(torch.randn(2, 4))[0].is_meta
    del model


def test_ranks_train_a_model_that_was_never_whole(tmp_path: Path) -> None:
    reference = Net(tie=True)
    save_file({n: t for n, t in reference.state_dict().items() if n != "second.weight"}, tmp_path / "model.safetensors")
    _, pipe = net(tie=True)
    x = torch.randn(4, 4)
    answers = on_ranks(2, _train, pipe, tmp_path, x)
    reference(x).square().mean().backward()
    for answer in answers:
        assert len(answer) == 2
        for name, grad in answer.items():
            torch.testing.assert_close(grad, reference.get_parameter(name).grad)


def _train(pipe: Pipe, folder: Path, x: torch.Tensor) -> dict[str, Any]:
    rank = dist.get_rank()
    driver = Driver(pipe, "1F1B", 2, lambda out: out.square().mean())
    with pytest.raises(StagecutError, match=f"stage {rank} is on the meta device"):
        driver.step(x)
    pipe.materialize(driver.stage_indices, folder, values=SCALE)
    driver.step(x)
    driver.sync_shared_gradients()
    assert all(p.is_meta for p in pipe.stages[1 - rank].parameters())
    return {name: p.grad for name, p in pipe.stages[rank].named_parameters()}


def test_a_rank_needs_the_memory_of_its_stage() -> None:
    """One of four stages of 64 MB: at its peak the process has half a stage more than the stage, at most, and not the model."""
    script = Path(__file__).parent / "cluster" / "memory.py"
    # the memory of a tensor goes back when it is freed, whatever was freed before
    alike = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, str(script), "--width", "2048"], capture_output=True, text=True, check=False, env=alike)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        found = json.loads(line)
        assert found["model"] > 3.9 * found["stage"]
        assert found["stage"] <= found["peak"] < 1.5 * found["stage"], found
