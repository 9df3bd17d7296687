"""Figures for papers: their text is text, and files are whole or absent."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial

import numpy as np
import pytest
from PIL import Image

from tve_hf.visualization import Explanation, Photograph, savefig

matplotlib = pytest.importorskip("matplotlib")
LABELS = ["tabby, $5 & <more>", "sofa"]


@pytest.fixture(params=[1, 2], ids=["one class", "two classes"])
def explanations(request):
    photograph = Photograph(Image.effect_noise((60, 40), 80))
    scores = np.random.default_rng(0).normal(size=(3, 4))
    made = [
        Explanation({"label": label, "score": 0.25, "attribution": scores}, photograph, "change of logit")
        for label in LABELS[: request.param]
    ]
    return made if request.param > 1 else made[0]


def shown(explanations) -> list[str]:
    labels = LABELS if isinstance(explanations, list) else LABELS[:1]
    return [*labels, "probability 25.0%", "change of logit", "for the class", "maps of 3 x 4 patches, smoothed"]


def test_svg_holds_its_text_and_its_pictures(explanations, tmp_path):
    savefig(explanations, tmp_path / "figure.svg")
    page = ElementTree.parse(tmp_path / "figure.svg")
    name = "{http://www.w3.org/2000/svg}"
    written = "\n".join("".join(text.itertext()) for text in page.iter(f"{name}text"))
    assert [text for text in shown(explanations) if text not in written] == []
    pictures = len(shown(explanations)) - 4 + 2  # the maps, the photograph and the scale
    assert len([*page.iter(f"{name}image")]) == pictures
    assert [path.name for path in tmp_path.iterdir()] == ["figure.svg"]


def test_pdf_holds_its_text_and_its_pictures(explanations, tmp_path):
    with matplotlib.rc_context({"pdf.compression": 0}):
        savefig(explanations, tmp_path / "figure.pdf")
    data = (tmp_path / "figure.pdf").read_bytes()
    assert data.startswith(b"%PDF") and data.rstrip().endswith(b"%%EOF")
    # A line is an array of strings, of one or two bytes a character, with numbers between that move them closer.
    lines = re.findall(rb"\[((?:\s*\((?:\\.|[^\\)])*\)|[\s\d.-])*)\]\s*TJ", data)
    strings = [b"".join(re.findall(rb"\(((?:\\.|[^\\)])*)\)", line)) for line in lines]
    written = b"\n".join(strings).replace(b"\0", b"").decode("latin-1")
    assert [text for text in shown(explanations) if text not in written] == []
    assert data.count(b"/Subtype /Image") == len(shown(explanations)) - 2


def test_the_same_figure_is_the_same_file(explanations, tmp_path):
    for ending in ("svg", "pdf"):
        files = [tmp_path / f"{name}.{ending}" for name in ("a", "b")]
        for file in files:
            savefig(explanations, file)
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_cannot_be_saved_is_said_in_a_sentence_and_nothing_is_written(explanations, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"figure\.png ends in neither \.pdf nor \.svg"):
        savefig(explanations, tmp_path / "figure.png")
    with pytest.raises(FileNotFoundError, match="none is no folder"):
        savefig(explanations, tmp_path / "none" / "figure.pdf")
    with pytest.raises(ValueError, match="one photograph"):
        savefig([], tmp_path / "figure.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        savefig(explanations, tmp_path / "figure.pdf")
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_leaves_the_earlier_file(explanations, tmp_path, monkeypatch):
    def full(figure, file, **options):
        file.write_bytes(b"%PDF half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "figure.pdf"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    pytest.raises(OSError, partial(savefig, explanations, path))
    assert path.read_bytes() == b"earlier" and [*tmp_path.iterdir()] == [path]
