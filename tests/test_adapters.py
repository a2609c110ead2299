"""Adapters of peft and of the user's own: trained by ranks as by one process, saved and loaded in peft's format."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from cluster.adapters import (
    ADAPTERS,
    SAMPLES,
    Reference,
    _config,
    adapted,
    base,
    cut,
    dora,
    ia3,
    inputs,
    lora,
    loss_of,
    optimizer_of,
    own_lora,
    saved_lora,
    train,
    train_each,
)
from cluster.matrix import SCHEDULES, on_ranks, stages_of
from torch import nn
from zoo.cuts import equal_ops

from stagecut import CheckpointError, Driver, Pipe, checkpoint, from_pretrained, pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft reads it
]
STEPS = 3


@pytest.mark.parametrize(
    ("stages", "tried"),
    [
        (2, {"lora": ["GPipe", "1F1B"], "mixed_lora": ["1F1B"], "saved_lora": ["GPipe"]}),
        (4, {"lora": ["LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"], "upper_lora": ["DualPipeV"],
             "dora": ["Interleaved1F1B"], "ia3": ["ZBVZeroBubble"], "own_lora": ["InterleavedZeroBubble"]}),
    ],
)  # fmt: skip
def test_adapters_train_as_in_one_process(stages: int, tried: dict[str, list[str]]) -> None:
    """`python tests/cluster/tune.py` tries all of them under all schedules."""
    work = [(*cut(name, stages), schedules) for name, schedules in tried.items()]
    assert all(stages_of(schedule, 2) == stages and schedule in SCHEDULES for _, _, schedules in work for schedule in schedules)
    on_ranks(2, train_each, work, STEPS)


def test_adapters_train_by_graphs_as_in_one_process() -> None:
    on_ranks(2, _train_by_graphs, *cut("lora", 2))


def _train_by_graphs(model: nn.Module, pipe: Pipe) -> None:
    driver = Driver(pipe, "1F1B", 2, loss_of, backward="graph")
    train(driver, optimizer_of(driver), range(2), Reference(model))
    assert driver.notes == ()


def test_frozen_stages_send_no_gradients_and_keep_nothing_for_a_backward() -> None:
    """A rank below all that is trained does nothing in a backward, and a rank above it lets gradients through."""
    counts = on_ranks(2, _count_step, [cut(name, 2)[1] for name in ("upper_lora", "lower_lora")])
    (first_upper, first_lower), (last_upper, last_lower) = counts
    assert first_upper["saved"] == 0
    assert last_upper["sent"] == 0
    assert min(first_lower["saved"], last_lower["saved"], last_upper["saved"]) > 0
    assert last_lower["sent"] > 0


def _count_step(pipes: list[Pipe]) -> list[dict[str, int]]:
    """For each pipe, what this rank sends to its neighbour, and the tensors that it saves for a backward, in a step of 4 micro-batches."""
    return [_count(Driver(pipe, "1F1B", 4, loss_of)) for pipe in pipes]


def _count(driver: Driver) -> dict[str, int]:
    train(driver, optimizer_of(driver), range(1))
    counts = {"sent": 0, "saved": 0}
    make = dist.P2POp.__init__

    def send(self: dist.P2POp, op: Any, *args: Any, **kwargs: Any) -> None:
        counts["sent"] += op is dist.isend
        make(self, op, *args, **kwargs)

    def save(tensor: torch.Tensor) -> torch.Tensor:
        counts["saved"] += 1
        return tensor

    with patch.object(dist.P2POp, "__init__", send), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        driver.step(**inputs(SAMPLES * driver.n_microbatches))
    return counts


# --- resuming, and folders of peft ----------------------------------------------------------------------

KINDS = ("lora", "own_qlora", "full")


def test_ten_steps_are_those_of_one_process_with_and_without_resuming_on_other_ranks(tmp_path: Path) -> None:
    """Five steps on two ranks and five on three; the adapter that three ranks save is that of one process, and merges as it does."""
    whole = on_ranks(2, _begin, [(cut(name, 2)[1], tmp_path / name) for name in KINDS])
    resumed = on_ranks(3, _go_on, [(_other_values(cut(name, 3)[1]), tmp_path / name) for name in KINDS])
    for place, name in enumerate(KINDS):
        model = ADAPTERS[name]()
        reference = Reference(model)
        losses = reference.train(range(10), 3)
        for answers in whole:
            torch.testing.assert_close(answers[place], losses, rtol=1e-9, atol=0)
        for answers in resumed:
            torch.testing.assert_close(answers[place], losses[5:], rtol=1e-9, atol=0)
        if name == "lora":
            _compare_adapters(reference.model, tmp_path / "adapter")


def _begin(work: list[tuple[Pipe, Path]]) -> list[torch.Tensor]:
    """The losses of ten steps; after five of them, a checkpoint without what is frozen."""
    answers = []
    for pipe, folder in work:
        driver = Driver(pipe, "1F1B", 3, loss_of)
        optimizer = optimizer_of(driver)
        losses = train(driver, optimizer, range(5))
        checkpoint.save(driver, optimizer, folder, {"step": 5}, frozen=False)
        answers.append(torch.stack(losses + train(driver, optimizer, range(5, 10))))
    return answers


def _other_values(pipe: Pipe) -> Pipe:
    """The pipe with other values wherever a checkpoint has some."""
    with torch.no_grad():
        for parameter in pipe.parameters():
            if parameter.requires_grad:
                parameter.fill_(7.0)
    return pipe


def _go_on(work: list[tuple[Pipe, Path]]) -> list[torch.Tensor]:
    answers = []
    for pipe, folder in work:
        driver = Driver(pipe, "1F1B", 3, loss_of)
        optimizer = optimizer_of(driver)
        if folder.name == "lora":
            with pytest.raises(CheckpointError, match=r"is frozen, and is not in the checkpoint"):
                checkpoint.load(driver, optimizer, folder)
        assert checkpoint.load(driver, optimizer, folder, frozen=False) == {"step": 5}
        answers.append(torch.stack(train(driver, optimizer, range(5, 10))))
        with pytest.raises(CheckpointError, match=r"no adapter of peft|there is no adapter in"):
            checkpoint.load_adapter(driver, folder, model=ADAPTERS[folder.name]())
        if folder.name == "lora":
            checkpoint.save_adapter(driver, folder.parent / "adapter", model=ADAPTERS["lora"]())
    return answers


def _compare_adapters(trained: Any, folder: Path) -> None:
    from peft import PeftModel

    again: Any = PeftModel.from_pretrained(base(), folder).double()
    assert again.state_dict().keys() == trained.state_dict().keys()
    torch.testing.assert_close(again.state_dict(), trained.state_dict(), rtol=1e-9, atol=1e-12)
    merged, expected = (model.merge_and_unload() for model in (again, trained))
    assert type(merged) is type(base())
    torch.testing.assert_close(merged.state_dict(), expected.state_dict(), rtol=1e-9, atol=1e-12)


# --- files of peft, in one process ----------------------------------------------------------------------


def _embedding() -> nn.Module:
    return adapted(_config("LoraConfig", r=2, target_modules=["embed_tokens", "q_proj"], use_rslora=True))


def _biased() -> nn.Module:
    return adapted(_config("LoraConfig", r=2, target_modules="all-linear", bias="lora_only", rank_pattern={"q_proj": 3}))


def _dora() -> nn.Module:
    return adapted(_config("LoraConfig", r=2, target_modules=["q_proj"], use_dora=True))


def _vera() -> nn.Module:
    return adapted(_config("VeraConfig", r=4, target_modules=["q_proj"]))


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
@pytest.mark.parametrize("make", [lora, saved_lora, _dora, ia3, _embedding, _biased, _vera])
def test_the_folder_is_that_of_peft_and_loads_into_other_stages(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    checkpoint.save_adapter(_pipe(model, 3), tmp_path / "run" / "ours")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["ours"]
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run/ours", "theirs"))
    assert ours == theirs
    assert _settings(tmp_path / "run" / "ours") == _settings(tmp_path / "theirs")
    other = make()
    pipe = _other_values(_pipe(other, 2))
    checkpoint.load_adapter(pipe, tmp_path / "theirs")
    assert all(torch.equal(tensor, pipe.state_dict()[name]) for name, tensor in model.state_dict().items())


def _pipe(model: nn.Module, stages: int) -> Pipe:
    return pipeline(model, (), inputs(SAMPLES), split_policy=equal_ops(stages), check=None)


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return {name: sorted(item) if isinstance(item, list) else item for name, item in settings.items()}


def test_an_adapter_without_a_wrapper_is_saved_as_peft_reads_it(tmp_path: Path) -> None:
    """transformers puts adapters into a model that stays its own class, and whose names have no prefix."""
    from peft import PeftModel

    model: Any = base()
    model.add_adapter(_config("LoraConfig", r=2, target_modules=["q_proj"]))
    checkpoint.save_adapter(_pipe(model, 2), tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert all(torch.equal(again.state_dict()[f"base_model.model.{name}"], tensor) for name, tensor in model.state_dict().items())


def test_one_of_several_adapters_is_saved_and_loaded_by_its_name(tmp_path: Path) -> None:
    model: Any = lora()
    model.add_adapter("second", _config("LoraConfig", r=3, target_modules=["k_proj"]))
    pipe = _pipe(model, 2)
    with pytest.raises(CheckpointError, match="the model has the adapters default, second"):
        checkpoint.save_adapter(pipe, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"the model has no adapter 'secnd'.*\n.*did you mean 'second'"):
        checkpoint.save_adapter(pipe, tmp_path / "adapter", adapter="secnd")
    checkpoint.save_adapter(pipe, tmp_path / "adapter", adapter="default")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoint.load_adapter(_other_values(pipe), tmp_path / "adapter", adapter="default")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items() if "second" not in name)


# --- what is refused ------------------------------------------------------------------------------------


def _alpha(alpha: int) -> Any:
    return adapted(_config("LoraConfig", r=4, target_modules=["q_proj"], lora_alpha=alpha), torch.float32)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (lambda folder: shutil.rmtree(folder), "there is no adapter in"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "there is no adapter in"),
    "pickled": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "pickled .bin files are not read",
    ),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "there is no adapter_config.json"),
    "half a config": (lambda folder: _halve(folder / "adapter_config.json"), "'adapter_config.json' cannot be read"),
    "half the tensors": (lambda folder: _halve(folder / "adapter_model.safetensors"), "'adapter_model.safetensors' cannot be read"),
    "a tensor less": (lambda folder: _edit(folder, lambda tensors: tensors.popitem()), "' is not in the adapter"),
    "a tensor more": (
        lambda folder: _edit(folder, lambda tensors: tensors.update(x=torch.ones(1))),
        "the adapter has 'x', and the model does not",
    ),
    "another shape": (
        lambda folder: _edit(folder, lambda tensors: tensors.update({[*tensors][-1]: torch.ones(3, 3)})),
        r"has shape \[3, 3\], that of the model \[",
    ),
    "wider floats": (
        lambda folder: _edit(folder, lambda tensors: tensors.update({key: item.double() for key, item in tensors.items()})),
        "is torch.float64, that of the model torch.float32, which cannot hold it",
    ),
    "another kind": (lambda folder: _replace(folder, ia3()), "the adapter is a IA3, that of the model a LORA"),
    "another scale": (lambda folder: _replace(folder, _alpha(32)), "the adapter has lora_alpha=32, that of the model 8"),
    "other modules": (
        lambda folder: _replace(folder, adapted(_config("LoraConfig", r=4, target_modules=["k_proj"]))),
        r"q_proj.lora_A.weight' and 7 more is not in the adapter",
    ),
}


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def _replace(folder: Path, model: Any) -> None:
    shutil.rmtree(folder)
    model.save_pretrained(folder)


def test_a_folder_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = _alpha(8)
    pipe = _pipe(model, 2)
    before = {name: tensor.clone() for name, tensor in pipe.state_dict().items()}
    for number, (damage, message) in enumerate(REFUSED.values()):
        folder = tmp_path / str(number)
        _alpha(8).save_pretrained(folder)
        with torch.no_grad():
            _edit(folder, lambda tensors: [tensor.fill_(5.0) for tensor in tensors.values()])
        damage(folder)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_adapter(pipe, folder)
        assert all(torch.equal(tensor, pipe.state_dict()[name]) for name, tensor in before.items())


def test_models_without_an_adapter_of_peft_are_told_what_to_do(tmp_path: Path) -> None:
    own = own_lora()
    pipe = _pipe(own, 2)
    with pytest.raises(CheckpointError, match=r"has no adapter of peft\n.*checkpoint.save\(..., frozen=False\)"):
        checkpoint.save_adapter(pipe, tmp_path / "adapter")
    model = lora()
    pipe = _pipe(model, 2)
    with pytest.raises(CheckpointError, match=r"is no model of transformers\n.*save_adapter"):
        checkpoint.save_pretrained(pipe, tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"the stages have no 'base_model.*q_proj.lora_magnitude_vector.default.weight', which"):
        checkpoint.save_adapter(pipe, tmp_path / "adapter", model=dora())
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="is there already"):
        checkpoint.save_adapter(pipe, tmp_path / "there")
    del model
    gc.collect()
    with pytest.raises(CheckpointError, match="the model that was cut is gone"):
        checkpoint.save_adapter(pipe, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


# --- a base that nobody holds as a whole -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
@pytest.mark.parametrize("name", ["lora", "vera"])
def test_a_new_adapter_on_a_folder_is_that_of_one_process(name: str, tmp_path: Path) -> None:
    base(torch.bfloat16).save_pretrained(tmp_path / "base")
    answers = on_ranks(2, _from_folder, tmp_path, name)
    model = _on_base(tmp_path / "base", name)
    state = model.state_dict()
    assert {key for answer in answers for key in answer} == state.keys()
    for answer in answers:
        assert all(torch.equal(tensor, state[key]) for key, tensor in answer.items())


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    "vera": ("VeraConfig", {"r": 4, "target_modules": ["q_proj"], "projection_prng_key": 3}),
}


def _on_base(folder: Path, name: str) -> Any:
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    kind, options = CONFIGS[name]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(5)
    return get_peft_model(model, _config(kind, **options))


def _from_folder(folder: Path, name: str) -> dict[str, torch.Tensor]:
    kind, options = CONFIGS[name]
    ids = torch.zeros(SAMPLES, 6, dtype=torch.int64)
    torch.manual_seed(5)
    pipe = from_pretrained(
        folder / "base", (), {"input_ids": ids, "labels": ids, "use_cache": False}, split_policy=equal_ops(2),
        adapter=_config(kind, **options),
    )  # fmt: skip
    driver = Driver(pipe, "1F1B", 2, loss_of)
    held = {key: item.clone() for i in driver.stage_indices for key, item in pipe.stages[i].state_dict().items()}
    optimizer = optimizer_of(driver)
    _, losses = driver.step(**inputs(4), use_cache=False)
    optimizer.step()
    assert losses.batch is not None
    checkpoint.save_adapter(driver, folder / name)
    other = from_pretrained(
        folder / "base", (), {"input_ids": ids, "labels": ids, "use_cache": False}, split_policy=equal_ops(2), adapter=folder / name
    )
    now = pipe.stages[driver.stage_indices[0]].state_dict()
    again = other.stages[driver.stage_indices[0]]
    assert all(torch.equal(item, now[key]) for key, item in again.state_dict().items())
    assert {key for key, p in again.named_parameters() if p.requires_grad} <= {*now}
    assert any(p.requires_grad for p in again.parameters())
    return held


def test_an_adapter_that_is_computed_from_its_base_is_refused_with_the_remedy(tmp_path: Path) -> None:
    base(torch.float32).save_pretrained(tmp_path)
    config = _config("LoraConfig", r=4, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector.*is computed from the weights of the base\n.*in one process"):
        from_pretrained(tmp_path, (), inputs(SAMPLES), split_policy=equal_ops(2), adapter=config)
    with pytest.raises(CheckpointError, match=r"there is no adapter_config.json in"):
        from_pretrained(tmp_path, (), inputs(SAMPLES), split_policy=equal_ops(2), adapter=tmp_path)
