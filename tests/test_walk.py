"""The way of a photograph: few files of the package stand between it and its picture."""

import sys
from pathlib import Path

from tiny import noise_image
from transformers import pipeline

import tve_hf

PACKAGE = Path(tve_hf.__file__).parent


def walk(run) -> list[str]:
    """The files of the package in which functions are called while `run` runs, in the order of the first calls."""
    files: dict[str, None] = {}

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            files[str(path.relative_to(PACKAGE))] = None

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return list(files)


def test_a_photograph_passes_few_files_to_become_a_picture(tmp_path):
    photograph = tmp_path / "photo.png"
    noise_image(0, (90, 70)).save(photograph)
    explain = pipeline("transferable-attribution")
    explain(str(photograph))  # the first one also tries whether the head can be folded into the explainer
    files = walk(lambda: explain(str(photograph))[0]["overlay"])
    assert files[0] == "pipeline_tve.py" and "visualization/drawing.py" in files
    assert len(files) <= 9, files
