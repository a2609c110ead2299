"""docs/CHECKPOINTS.md and docs/INFERENCE.md: their Python runs on two processes, on small models and folders of this test's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from stagecut import Driver, SplitPoint, pipeline

DOCS = Path(__file__).parent.parent / "docs"
SIZES = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 32}


def config(use_cache: bool) -> LlamaConfig:
    return LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2, use_cache=use_cache)


def blocks(page: str, smaller: dict[str, str]) -> list[str]:
    """The Python of a page, with what is too large for a test made smaller."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for large, small in smaller.items():
        assert large in text
        text = text.replace(large, small)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def saved_model(folder: Path, use_cache: bool) -> str:
    """A folder of transformers, which rank 0 writes."""
    torch.manual_seed(0)
    if dist.get_rank() == 0:
        model = LlamaForCausalLM(config(use_cache))
        model.save_pretrained(folder / "llama")
    dist.barrier()
    return str(folder / "llama")


def test_checkpoints(tmp_path: Path) -> None:
    assert on_ranks(2, _checkpoints, tmp_path) == ["ok", "ok"]


def _checkpoints(folder: Path) -> str:
    smaller = {
        "512": "16",
        "path/to/llama": saved_model(folder, use_cache=False),
        "path/to/tuned": str(folder / "tuned"),
        '"run': f'"{folder}/run',
        "model.layers.16": "model.layers.2",
        "stages=4": "stages=2",
    }
    first, fresh, _, second, third, fourth = blocks("CHECKPOINTS.md", smaller)  # one says what `fresh` does
    names: dict[str, Any] = {
        "torch": torch,
        "config": config(use_cache=False),
        "loss": _loss,
        "LlamaForCausalLM": LlamaForCausalLM,
        "pipeline": pipeline,
        "SplitPoint": SplitPoint,
        "Driver": Driver,
        "StateDictOptions": StateDictOptions,
        "get_optimizer_state_dict": get_optimizer_state_dict,
        "set_optimizer_state_dict": set_optimizer_state_dict,
    }
    exec(first, names)
    ids = torch.arange(16 * 16).reshape(16, 16) % 32
    names["driver"].attach(names["optimizer"])
    names["driver"].step(input_ids=ids, target=ids)
    names["optimizer"].step()
    names["scheduler"] = torch.optim.lr_scheduler.ConstantLR(names["optimizer"])
    exec(second, names)
    assert names["extra"]["step"] == 100
    model = names["model"] = LlamaForCausalLM(names["config"])
    names["optimizer"] = torch.optim.AdamW(model.parameters(), 1e-4)
    exec(third, names)
    exec(fourth, names)
    dist.barrier()
    tuned = AutoModelForCausalLM.from_pretrained(folder / "tuned").state_dict()
    for name, tensor in names["pipe"].get_stage_module(dist.get_rank()).state_dict().items():
        assert torch.equal(tensor, tuned[name])
    exec(fresh, names)
    for name, tensor in names["pipe"].get_stage_module(dist.get_rank()).named_parameters():
        assert "norm" in name or not torch.equal(tensor, tuned[name])
    return "ok"


def _loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())


def test_inference(tmp_path: Path) -> None:
    assert on_ranks(2, _inference, tmp_path) == ["ok", "ok"]


def _inference(folder: Path) -> str:
    where = saved_model(folder, use_cache=True)
    model: Any = LlamaForCausalLM.from_pretrained(where).eval()
    one_process, on_two, several, again = blocks("INFERENCE.md", {"max_new_tokens=64": "max_new_tokens=4", "512": "16"})
    request = {"input_ids": torch.tensor([[3, 5, 7]]), "max_new_tokens": 4, "pad_token_id": 0}
    names: dict[str, Any] = {
        "torch": torch,
        "dist": dist,
        "model": model,
        "input_ids": request["input_ids"],
        "mask": torch.ones(1, 3, dtype=torch.long),
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "StaticCache": StaticCache,
        "config": config(use_cache=True),
        "device": "cpu",
        "folder": where,
        "requests": [request, request],
        "group": dist.group.WORLD,
    }
    exec(one_process, names)
    tokens: Callable[..., Any] = lambda: names["generator"].generate(**request)
    expected = model.generate(**request)
    assert torch.equal(tokens(), expected)
    exec(on_two, names)
    assert names["model"].device.type == "meta"
    names["model"] = model
    exec(several, names)
    assert all(torch.equal(result, expected) for result in names["results"])
    exec(again, names)
    return "ok"
