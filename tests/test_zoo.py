"""One architecture of every kind in the zoo; `make zoo` checks them all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from zoo.check import check
from zoo.models import ARCHITECTURES

from stagecut import pipeline

SAMPLE = {
    "LlamaForCausalLM": 4,
    "FalconForCausalLM alibi": 2,
    "MixtralForCausalLM": 2,
    "MambaForCausalLM": 4,
    "AlbertForMaskedLM": 4,
    "BertForSequenceClassification": 2,
    "T5ForConditionalGeneration": 4,
    "ResNetForImageClassification": 4,
    "SwinForImageClassification": 2,
    "CLIPModel": 4,
    "UNet2d": 4,
    "RecurrentNet": 2,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_the_stages_do_what_the_model_does(name: str) -> None:
    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    assert check(architecture, SAMPLE[name]) == "ok"


def test_names_are_unique() -> None:
    names = [a.name for a in ARCHITECTURES]
    assert len(names) == len(set(names)) >= 60


SIX = (
    "LlamaForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration",
)  # fmt: skip


@pytest.mark.parametrize("name", SIX)
def test_no_module_is_kept_whole_by_itself(name: str) -> None:
    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    pipe = pipeline(architecture.make().eval(), mb_kwargs=architecture.inputs(), stages=2)
    assert pipe.notes == ()
