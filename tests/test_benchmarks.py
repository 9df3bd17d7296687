"""The scripts in `benchmarks/` run, and count what they say they count; what they time is not tested."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tiny import save_classifier, save_noise

ROOT = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("files", [False, True])
def test_fidelity_is_compared_with_the_passes_that_it_needs(tmp_path, monkeypatch, capsys, files) -> None:
    arguments = ["--num_images", "3", "--batch_size", "2", "--num_levels", "5", "--grid_size", "4"]
    if files:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        arguments += ["--files", str(save_noise(tmp_path / "noise.parquet", 2))]
    monkeypatch.setattr(sys, "argv", ["fidelity.py", str(save_classifier(tmp_path / "classifier")), *arguments])
    runpy.run_path(str(ROOT / "fidelity.py"), run_name="__main__")
    report = json.loads(capsys.readouterr().out)
    assert report["passes_per_image"] == 8
    assert report["ratio"] == pytest.approx(report["fidelity_seconds"] / report["bare_seconds"], rel=0.05)
    assert report["num_images"] == 3


@pytest.mark.slow
def test_import_time_compares_two_imports(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["import_time.py", "--repeats", "1"])
    runpy.run_path(str(ROOT / "import_time.py"), run_name="__main__")
    report = json.loads(capsys.readouterr().out)
    assert report["ratio"] == pytest.approx(report["tve_hf_seconds"] / report["transformers_seconds"], rel=0.01)
