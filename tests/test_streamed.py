"""Files that are written piece by piece have the bytes that safetensors itself writes."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stagecut import CheckpointError
from stagecut.backend.files import streamed

DTYPES = sorted(streamed._NAMES, key=str)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text('ab.é"\\', max_size=6).filter(lambda name: name != "__metadata__"), st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=8
)


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 2, shape).to(dtype)


@settings(max_examples=60, deadline=None)
@given(described=TENSORS, piece=st.integers(1, 40), from_device=st.booleans())
def test_bytes_are_those_of_safetensors(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, tuple[torch.dtype, tuple[int, ...]]], piece: int, from_device: bool
) -> None:
    tensors = {name: tensor_of(*form) for name, form in described.items()}
    folder = tmp_path_factory.mktemp("files")
    save_file(tensors, folder / "theirs", metadata={"format": "pt"})
    with patch.object(streamed, "PIECE", piece), patch.object(streamed, "_is_on_host", lambda _: not from_device):
        streamed.write_file(tensors, folder / "ours")
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_every_dtype_and_tensors_that_are_not_contiguous_come_back(tmp_path: Path) -> None:
    tensors = {str(dtype): tensor_of(dtype, (3, 4)).t() for dtype in DTYPES}
    streamed.write_file(tensors, tmp_path / "file")
    loaded = load_file(tmp_path / "file")
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_a_dtype_that_no_file_holds_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'w' is torch.complex128, which no safetensors file holds"):
        streamed.write_file({"w": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "file")
    assert not [*tmp_path.iterdir()]
