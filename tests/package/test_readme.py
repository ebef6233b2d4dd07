"""The README's first picture is made by the lines as they stand there."""

import re
from pathlib import Path

import pytest
from PIL import Image


README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_first_lines_make_a_picture(tmp_path, monkeypatch):
    code = re.search(r"## A first picture\n\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    with Image.open(tmp_path / "picture.png") as picture:
        assert len(picture.getcolors(maxcolors=10**6)) > 100  # a picture, not one colour
