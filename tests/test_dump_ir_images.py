"""hf: architectures that look at images get inputs that they run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagecut.ir.text.parser import parse
from stagecut.tools.dump_ir.main import main


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 1
    return capsys.readouterr().err


def test_a_model_gets_as_many_image_tokens_as_it_checks_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["hf:llava", "--length", "5", "--bisect"]) == 0
    assert capsys.readouterr().out.startswith("no pass changes what the program computes")
    assert main(["hf:llava", "--length", "5", "--passes", ""]) == 0
    text = capsys.readouterr().out
    assert str(parse(text).inputs[0].type) == "i64[2,21] batch(0)"  # 4 x 4 patches, and the text
    (tmp_path / "llava.ir").write_text(text)
    shown = failure(capsys, str(tmp_path / "llava.ir"), "--passes", "all", "--bisect")
    assert "cannot run on random inputs, and text holds no others: aten._assert_scalar.default" in shown
    assert "try: check the model that the text is of" in shown


def test_a_length_of_text_that_is_not_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--length is how many tokens a row has, and ViTModel reads none" in failure(capsys, "hf:vit", "--length", "8")


@pytest.mark.parametrize("name", ["vit", "llava"])
def test_images_on_the_meta_device(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"hf:{name}", "--meta", "--passes", ""]) == 0
    assert {str(value.type).partition("@")[2].partition(" ")[0] for value in parse(capsys.readouterr().out).inputs} == {"meta"}
