"""One architecture of every kind in the zoo; `make zoo` checks them all."""

from __future__ import annotations

import pytest
from zoo.check import check
from zoo.models import ARCHITECTURES

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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_the_stages_do_what_the_model_does(name: str) -> None:
    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    assert check(architecture, SAMPLE[name]) == "ok"


def test_names_are_unique() -> None:
    names = [a.name for a in ARCHITECTURES]
    assert len(names) == len(set(names)) >= 60
