"""Folders of transformers: read stage by stage, written by several ranks, and the same as those of the unsplit model."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster.matrix import RanksFailed, on_ranks
from cluster.models import VOCABULARY, _gpt, _llama, _t5
from hub.check import SUBJECTS, check
from torch import nn
from zoo.cuts import equal_ops

from stagecut import CheckpointError, Driver, InputError, Pipe, SplitPoint, checkpoint, from_pretrained, pipeline
from stagecut.backend.files import pretrained

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")]
IDS = {"input_ids": torch.arange(12).view(2, 6) % VOCABULARY, "use_cache": False}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_a_folder_that_three_ranks_trained_is_that_of_one_process(name: str, tmp_path: Path) -> None:
    subject = next(each for each in SUBJECTS if each.name == name)
    assert check(subject, tmp_path) == []


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=VOCABULARY,
        num_local_experts=4, bos_token_id=1, eos_token_id=2, experts_implementation="batched_mm",
    )  # fmt: skip
    return MixtralForCausalLM(config)


def _cut(make: Callable[[], nn.Module], stages: int = 2) -> tuple[Any, Pipe]:
    torch.manual_seed(0)
    model = make().eval()
    return model, pipeline(model, (), IDS, split_policy=equal_ops(stages), check=None)


def _keys(folder: Path) -> set[str]:
    return {key for file in folder.glob("*.safetensors") for key in _keys_of(file)}


def _keys_of(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return [*handle.keys()]


def _same(model: nn.Module, other: nn.Module) -> bool:
    state, want = other.state_dict(), model.state_dict()
    return state.keys() == want.keys() and all(torch.equal(tensor, state[name]) for name, tensor in want.items())


@pytest.mark.parametrize("original", [True, False])
def test_experts_are_written_one_by_one_or_as_the_model_holds_them(original: bool, tmp_path: Path) -> None:
    model, pipe = _cut(_mixtral)
    checkpoint.save_pretrained(pipe, tmp_path / "ours", save_original_format=original)
    model.save_pretrained(tmp_path / "theirs", save_original_format=original)
    assert _keys(tmp_path / "ours") == _keys(tmp_path / "theirs")
    assert any("experts.0.w1" in key for key in _keys(tmp_path / "ours")) == original
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert _same(model, again)
    options = {"experts_implementation": "batched_mm"}
    assert _same(model, from_pretrained(tmp_path / "ours", (), IDS, split_policy=equal_ops(3), model_kwargs=options))


def test_experts_are_put_together_from_the_files_of_one_stage(tmp_path: Path) -> None:
    """A process opens no file with experts of other stages."""
    model, pipe = _cut(_mixtral)
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    with torch.device("meta"):
        bare = _mixtral().eval()
    inputs = {name: item.to("meta") if isinstance(item, torch.Tensor) else item for name, item in IDS.items()}
    pipe = pipeline(bare, (), inputs, split_policy=equal_ops(2), check=None)
    for file in [*tmp_path.glob("*.safetensors")]:
        if all("layers.1." in key for key in _keys_of(file)):
            file.rename(file.with_suffix(".away"))
    init_fn = bare._init_weights  # type: ignore[operator]
    pipe.materialize(0, tmp_path, init_fn=init_fn)
    held = pipe.stages[0].state_dict()
    assert any("experts" in name for name in held)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in held.items())
    with pytest.raises(CheckpointError, match="is missing, though the index names it"):
        pipe.materialize(1, tmp_path, init_fn=init_fn)
    assert all(tensor.is_meta for tensor in pipe.stages[1].parameters())


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = _cut(_mixtral)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"makes no 'model.layers.0.mlp.experts.gate_up_proj' of 'model.layers.0.*and 4 more"):
        from_pretrained(tmp_path, (), IDS, split_policy=equal_ops(2), model_kwargs={"experts_implementation": "batched_mm"})


def test_old_names_of_the_hub_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertForMaskedLM

    size: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY}
    model = BertForMaskedLM(BertConfig(**size)).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for name in tensors}
    assert old != tensors.keys()
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensors[name] for name in tensors
    }
    save_file(renamed, tmp_path / "model.safetensors")
    pipe = from_pretrained(tmp_path, (), {"input_ids": IDS["input_ids"]}, split_policy=equal_ops(2))
    assert _same(model, pipe)


def test_a_small_model_is_one_file_without_an_index(tmp_path: Path) -> None:
    model, pipe = _cut(_gpt)
    checkpoint.save_pretrained(pipe, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs" / "model.safetensors").read_bytes()
    again = type(model).from_pretrained(tmp_path / "ours")
    assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.parametrize(("size", "most"), [(10**9, 10**9), ("4KB", 4000), ("0.004 MB", 4000), (1, 1)])
def test_files_are_no_larger_than_asked_for(size: int | str, most: int, tmp_path: Path) -> None:
    _, pipe = _cut(_llama)
    checkpoint.save_pretrained(pipe, tmp_path / "1", max_shard_size=size)
    state = pipe.state_dict()
    sizes = [[state[key].nbytes for key in _keys_of(file)] for file in sorted((tmp_path / "1").glob("*.safetensors"))]
    assert sum(map(sum, sizes)) == sum(tensor.nbytes for tensor in state.values())
    assert all(sum(each) <= most or len(each) == 1 for each in sizes)
    assert all(sum(one) + max(other) > most for one, other in pairwise(sizes))
    if len(sizes) > 1:
        index = json.loads((tmp_path / "1" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, sizes))
        assert set(index["weight_map"].values()) == {f"model-{i + 1:05}-of-{len(sizes):05}.safetensors" for i in range(len(sizes))}
        assert index["weight_map"].keys() == state.keys()


@pytest.mark.parametrize("size", ["much", "-1GB", 0, "5 apples"])
def test_a_size_that_is_none_is_refused(size: Any, tmp_path: Path) -> None:
    _, pipe = _cut(_llama)
    with pytest.raises(CheckpointError, match="is no size"):
        checkpoint.save_pretrained(pipe, tmp_path / "1", max_shard_size=size)
    assert not list(tmp_path.iterdir())


class Unread(nn.Module):
    """A head that forward never calls."""

    def __new__(cls) -> Any:
        model: Any = _llama()
        model.unread = nn.Linear(3, 3)
        return model


def test_what_no_stage_reads_is_saved_too(tmp_path: Path) -> None:
    model, pipe = _cut(Unread)  # type: ignore[arg-type]
    checkpoint.save_pretrained(pipe, tmp_path / "1")
    assert _keys(tmp_path / "1") == model.state_dict().keys()
    with torch.device("meta"):
        bare: Any = Unread()
    checkpoint.save_pretrained(deepcopy(pipe), tmp_path / "2", model=bare)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_another_model_is_refused(tmp_path: Path) -> None:
    _model, pipe = _cut(_llama)
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM and the stages have not the same 'unread\.(weight|bias)'"):
        checkpoint.save_pretrained(pipe, tmp_path / "1", model=Unread())  # type: ignore[arg-type]
    wide: Any = _llama()
    wide.resize_token_embeddings(VOCABULARY + 8)
    with pytest.raises(CheckpointError, match=r"not the same '(lm_head|model\.embed_tokens)\.weight'"):
        checkpoint.save_pretrained(pipe, tmp_path / "1", model=wide)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    model, pipe = _cut(_llama)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"):
        checkpoint.save_pretrained(pipe, tmp_path / "1")
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["mine"]
    with pytest.raises(CheckpointError, match="of a Driver or of a Pipe, not of a LlamaForCausalLM"):
        checkpoint.save_pretrained(model, tmp_path / "2")
    with pytest.raises(CheckpointError, match="is no folder"):
        checkpoint.save_pretrained(pipe, 3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"the model that was cut is gone(?s:.)*model=\.\.\."):
        checkpoint.save_pretrained(deepcopy(pipe), tmp_path / "2")
    plain = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="Linear is no model of transformers"):
        checkpoint.save_pretrained(pipeline(plain, (torch.ones(2, 2),)), tmp_path / "2")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_stages_on_meta_are_not_saved(tmp_path: Path) -> None:
    model, _ = _cut(_llama)
    model.save_pretrained(tmp_path / "1")
    with torch.device("meta"):
        bare = _llama()
    inputs = {name: item.to("meta") if isinstance(item, torch.Tensor) else item for name, item in IDS.items()}
    pipe = pipeline(bare, (), inputs, split_policy=equal_ops(2), check=None)
    with pytest.raises(Exception, match="stage 0 is on the meta device"):
        checkpoint.save_pretrained(pipe, tmp_path / "2")
    assert not (tmp_path / "2").exists()


def test_a_tie_that_the_class_does_not_declare_is_refused(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model: Any = _llama()
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model  # type: ignore[no-any-return]

    _model, pipe = _cut(make)
    with pytest.raises(CheckpointError, match=r"are one tensor, and LlamaForCausalLM does not say so"):
        checkpoint.save_pretrained(pipe, tmp_path / "1")


def _save_on_ranks(folder: Path, *others: Path, kill: bool = False, broken: bool = False) -> str:
    pipe = from_pretrained(folder, (), IDS, split_policy=equal_ops(2))
    driver = Driver(pipe, "GPipe", 2)
    if kill:
        pretrained.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if broken and 1 in driver.stage_indices:
        pipe.stages[1].register_buffer("extra", torch.ones(1))
    try:
        for other in others:
            checkpoint.save_pretrained(driver, other)
    except CheckpointError as error:
        return str(error)
    return "ok"


def _killed(*folders: Path) -> str:
    return _save_on_ranks(*folders, kill=True)


def _broken(*folders: Path) -> str:
    return _save_on_ranks(*folders, broken=True)


def test_ranks_save_together_or_not_at_all(tmp_path: Path) -> None:
    model, _ = _cut(_gpt)
    model.save_pretrained(tmp_path / "start")
    first, second = on_ranks(2, _broken, tmp_path / "start", tmp_path / "1")
    assert first.startswith("rank 1: ")
    assert "'extra' is no tensor of the traced model" in first
    assert "'extra' is no tensor of the traced model" in second
    with pytest.raises(RanksFailed):
        on_ranks(2, _killed, tmp_path / "start", tmp_path / "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".1.partial", "start"]
    assert on_ranks(2, _save_on_ranks, tmp_path / "start", tmp_path / "1") == ["ok", "ok"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "start"]
    assert _same(model, type(model).from_pretrained(tmp_path / "1"))


def test_a_folder_becomes_a_pipe_in_one_process(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    model: Any = _t5().eval()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "1")
    inputs = {"input_ids": IDS["input_ids"], "decoder_input_ids": IDS["input_ids"], "use_cache": False}
    pipe = from_pretrained(tmp_path / "1", (), inputs, stages=2, model_class=AutoModelForSeq2SeqLM)
    assert not pipe.training
    assert torch.equal(pipe.module()(**inputs).logits, model(**inputs).logits)
    checkpoint.save_pretrained(pipe, tmp_path / "2")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_another_dtype_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    model, _ = _cut(_llama)
    model.save_pretrained(tmp_path)
    pipe = from_pretrained(tmp_path, (), IDS, split_policy=equal_ops(2), dtype=torch.bfloat16)
    assert _same(model.bfloat16(), pipe)


def test_a_folder_that_is_none_of_transformers_is_refused(tmp_path: Path) -> None:
    def fails(match: str, folder: Any = tmp_path, **options: Any) -> None:
        with pytest.raises((CheckpointError, InputError), match=match):
            from_pretrained(folder, (), IDS, split_policy=equal_ops(2), **options)

    fails("is no folder", "meta-llama/Llama-3.1-8B")
    fails("3 is no folder", 3)
    fails("there is no config.json")
    model, _ = _cut(_llama)
    model.config.architectures = ["Llama9ForCausalLM"]
    model.config.save_pretrained(tmp_path)
    fails(r"names Llama9ForCausalLM, which transformers does not have(?s:.)*model_class=")
    fails("is no class of transformers", model_class=nn.Linear)
    fails("there is no checkpoint in", model_class=type(model))
    (tmp_path / "pytorch_model.bin").write_bytes(b"none")
    fails("there is no checkpoint in(?s:.)*bin files are not read", model_class=type(model))
    for broken in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"lm_head.weight": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(broken)
        fails("'model.safetensors.index.json' cannot be read", model_class=type(model))
    (tmp_path / "model.safetensors.index.json").unlink()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    fails("are quantized")


def _fuse() -> None:
    """Files of Llama have one tensor for two of the model's, as those of some models do."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    two = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    register_checkpoint_conversion_mapping("LlamaForCausalLM", [WeightConverter("mlp.gate_up.weight", two, [Chunk(dim=0)])], overwrite=True)


@pytest.fixture
def fused() -> Iterator[None]:
    """Inside, files of Llama are so."""
    _fuse()
    yield
    _forget()


def _forget() -> None:
    """Files of Llama are as they are."""
    from transformers import conversion_mapping

    conversion_mapping._checkpoint_conversion_mapping_cache.pop("LlamaForCausalLM")  # type: ignore[union-attr]
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard("LlamaForCausalLM")


@pytest.mark.usefixtures("fused")
def test_a_tensor_that_the_model_holds_as_two_is_read_and_written(tmp_path: Path) -> None:
    model, pipe = _cut(_llama)
    model.save_pretrained(tmp_path / "theirs")
    assert any("mlp.gate_up.weight" in key for key in _keys(tmp_path / "theirs"))
    assert _same(model, from_pretrained(tmp_path / "theirs", (), IDS, split_policy=equal_ops(3)))
    checkpoint.save_pretrained(pipe, tmp_path / "ours")
    assert _keys(tmp_path / "ours") == _keys(tmp_path / "theirs")
    assert _same(model, type(model).from_pretrained(tmp_path / "ours"))


@pytest.mark.usefixtures("fused")
def test_a_tensor_of_the_files_that_is_made_of_several_ranks_is_refused(tmp_path: Path) -> None:
    model, _ = _cut(_llama)
    model.save_pretrained(tmp_path / "start")
    answers = on_ranks(2, _save_divided, tmp_path / "start", tmp_path / "1", True)
    assert all(re.search(r"mlp\.(gate|up)_proj.weight' and '.*' are one tensor in the files of transformers", answer) for answer in answers)
    assert [path.name for path in tmp_path.iterdir()] == ["start"]
    assert on_ranks(2, _save_divided, tmp_path / "start", tmp_path / "1", False) == ["ok", "ok"]
    assert _same(model, type(model).from_pretrained(tmp_path / "1"))


def test_a_name_of_the_model_that_looks_like_one_of_the_hub_is_its_own(tmp_path: Path) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    model, pipe = _cut(_llama)
    checkpoint.save_pretrained(pipe, tmp_path / "1")
    conversion_mapping.register_checkpoint_conversion_mapping("LlamaForCausalLM", [WeightRenaming("mlp", "ffn")], overwrite=True)
    try:
        assert _same(model, from_pretrained(tmp_path / "1", (), IDS, split_policy=equal_ops(2)))
    finally:
        _forget()


def _save_divided(folder: Path, other: Path, original: bool) -> str:
    """A cut between two tensors that are one in the files."""
    _fuse()
    pipe = from_pretrained(folder, (), IDS, {"model.layers.1.mlp.up_proj": SplitPoint.BEGINNING})
    try:
        checkpoint.save_pretrained(Driver(pipe, "GPipe", 2), other, save_original_format=original)
    except CheckpointError as error:
        return str(error)
    return "ok"
