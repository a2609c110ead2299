"""One architecture of every kind in the zoo, cut in both modes and switched to the other and back; `make zoo` checks them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from zoo.backward import check_backward
from zoo.check import ONE_MODE, check
from zoo.models import ARCHITECTURES, Architecture

from stagecut import pipeline

SAMPLE = {
    "LlamaForCausalLM": 4,
    "FalconForCausalLM alibi": 2,
    "GPT2LMHeadModel": 4,
    "MixtralForCausalLM": 2,
    "MambaForCausalLM": 4,
    "AlbertForMaskedLM": 4,
    "BertForSequenceClassification": 2,
    "T5ForConditionalGeneration": 4,
    "BartForConditionalGeneration": 2,
    "ViTForImageClassification": 2,
    "ResNetForImageClassification": 4,
    "SwinForImageClassification": 2,
    "CLIPModel": 4,
    "UNet2d": 4,
    "RecurrentNet": 2,
}


ONE_MODES = {"MambaForCausalLM": "MambaModel.forward: the model returns another structure in the other mode"}
"""Those that refuse the switch, and why: Mamba returns its cache in eval mode only."""


def small(name: str, stages: int) -> Architecture:
    """The architecture; of two stages, each has one of two layers. Those of four show what is repeated."""
    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    if stages > 2 or "num_hidden_layers" not in architecture.config:
        return architecture
    return replace(architecture, config=architecture.config | {"num_hidden_layers": 2})


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
    notes: list[str] = []
    result = check(small(name, SAMPLE[name]), SAMPLE[name], notes)
    assert result.endswith(ONE_MODES[name]) if name in ONE_MODES else result == "ok", result
    assert not [note for note in notes if "kept whole" in note]


@pytest.mark.filterwarnings("ignore")
def test_layers_that_are_dropped_by_chance_follow_or_refuse() -> None:
    """Whether a layer runs is drawn in training: the encoder is kept whole there, and follows; cut in eval mode it is not, and says so."""
    (architecture,) = (a for a in ARCHITECTURES if a.name == "Wav2Vec2ForSequenceClassification")
    result = check(replace(architecture, config=architecture.config | {"layerdrop": 0.5, "num_hidden_layers": 2}), 2)
    assert result.startswith(f"{ONE_MODE}: cut in eval mode: ")
    assert "leaf_modules=['wav2vec2.encoder']" in result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "RecurrentNet", "UNet2d"])
def test_graphs_compute_what_autograd_does(name: str) -> None:
    assert check_backward(small(name, 2), 2) == "ok"


def test_names_are_unique() -> None:
    names = [a.name for a in ARCHITECTURES]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "BertForMaskedLM"])
def test_no_module_is_kept_whole_by_itself(name: str) -> None:
    architecture = small(name, 2)
    pipe = pipeline(architecture.make().eval(), mb_kwargs=architecture.inputs(), stages=2)
    assert not [note for note in pipe.notes if "kept whole" in note]
