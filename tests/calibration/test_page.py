"""The examples of docs/calibration.md run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "calibration.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    with pytest.warns(UserWarning, match=r"^1 of 8 calibration samples .* 1 \("):
        for example in examples:
            exec(compile(example, str(PAGE), "exec"), names)
    assert len(examples) == 4
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["calibration.safetensors"]
