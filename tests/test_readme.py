"""Every Python block of README runs, in order, in one session, as a newcomer would type it."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_readme_python_blocks_run(tmp_path, monkeypatch):
    data = pytest.importorskip("skimage.data")
    cat = Image.fromarray(data.chelsea())
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        cat.save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    assert len(BLOCKS) >= 4
    # `label="tabby"` stands for a name that the user's own classifier knows.
    labels = "explain('photo.jpg', top_k=1)[0]['label']"
    for block in BLOCKS:
        exec(compile(block.replace('"tabby"', labels), str(README), "exec"), namespace)
    explanation = namespace["explanation"]
    assert explanation["attribution"].shape == (8, 8)
    assert Image.open("why.png").size == cat.size
    assert namespace["scores"].shape == (1, 64)
    assert torch.isfinite(namespace["scores"]).all()
