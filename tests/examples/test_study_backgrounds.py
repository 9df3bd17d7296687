"""The study of backgrounds on noise: every map it names, and its numbers by hand."""

import json
import sys

import pytest
import torch
from scripts import load_example
from tiny import GRID, save_noise, save_pair

import tve_hf

study = load_example("study_backgrounds")


def test_report_and_one_of_its_gaps(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    classifier, _ = save_pair(tmp_path)
    noise = save_noise(tmp_path / "noise.parquet", 3)
    arguments = ["--case", str(classifier), str(GRID), "1", str(noise), "--num_images", "2", "--num_samples", "20"]
    arguments += ["--num_levels", "4", "--batch_size", "2", "--output_file", "report.json", "--plot", "plot.png"]
    monkeypatch.setattr(sys, "argv", ["study_backgrounds.py", *arguments])
    study.main()
    (table,) = json.loads((tmp_path / "report.json").read_text())["cases"].values()
    sources = {way.split("/")[0] for way in table}
    assert sources == {"two states", study.MIXED, *study.SOURCES} and (tmp_path / "plot.png").stat().st_size > 0
    assert len(table) == len(study.RULES) * (2 * len(sources) + 3)  # three smooth ones are smoothed as well

    split = tve_hf.split_classifier(classifier)
    data = datasets.Dataset.from_parquet(str(noise))
    rows = torch.randperm(3, generator=torch.Generator().manual_seed(0)).flip(0)[:2].tolist()
    x = split.image_processor([data[row]["image"] for row in rows], return_tensors="pt")["pixel_values"]
    class_idx = split(x).logits.argmax(-1)
    kept, removed = tve_hf.sampled_meta_attribution(split, x, GRID, 20, "uniform")
    scores = tve_hf.transfer(kept, removed, split, class_idx, "logit", GRID)
    gap = tve_hf.fidelity(split, x, scores, class_idx, 4, GRID, "zero").gap.mean().item()
    assert table["uniform/logit/as they are"]["zero"]["gap"] == pytest.approx(gap, abs=2e-4)
