"""The study of sampled backgrounds: against a slow loop over the same draws, and as a command."""

import json
import sys

import pytest
import torch
from tiny import GRID, HOPS, noise_image, save_classifier

import tve_hf


@torch.no_grad()
def test_values_are_those_of_a_loop_and_smaller_samples_cost_nothing(study, shared_model, images) -> None:
    model, x = shared_model("cnn"), images(1, 32)
    classifier = tve_hf.split_classifier(model)
    passes = []
    handle = model.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    with handle:
        two_states, sampled = study.compare(classifier, x, GRID, HOPS, [2, 5], 3, torch.Generator().manual_seed(3))
    assert sum(passes) == 1 + 3 * (2 + 2 * 5)  # the class; each patch's two states and pairs of the larger sample

    y = model(x).argmax(-1)

    def log_prob(kept: list[bool]) -> float:
        masked = torch.zeros_like(x)
        for patch in range(16):
            if kept[patch]:
                row, column = 8 * (patch // 4), 8 * (patch % 4)
                masked[..., row : row + 8, column : column + 8] = x[..., row : row + 8, column : column + 8]
        return model(masked).log_softmax(-1)[0, y].item()

    generator = torch.Generator().manual_seed(3)
    patches = sorted(torch.rand(1, 16, generator=generator).argsort()[0, :3].tolist())
    near = {
        z: [abs(z // 4 - other // 4) <= HOPS and abs(z % 4 - other % 4) <= HOPS for other in range(16)]
        for z in patches
    }
    draws = [torch.rand(16, 16, generator=generator) < 0.5 for _ in range(5)]
    for i, z in enumerate(patches):
        assert abs(two_states[i] - (log_prob(near[z]) - log_prob([not inside for inside in near[z]]))) < 1e-5
        gains = []
        for draw in draws:
            background = [bool(draw[z, other]) and not near[z][other] for other in range(16)]
            union = [a or b for a, b in zip(background, near[z], strict=True)]
            gains.append(log_prob(union) - log_prob(background))
        for n in (2, 5):
            assert abs(sampled[n][i] - sum(gains[:n]) / n) < 1e-5


@pytest.mark.parametrize("num_patches", [None, 5])
def test_the_command_reports_correlations_of_every_image(tmp_path, monkeypatch, study, num_patches) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [noise_image(seed) for seed in range(4)]}, features=features)
    rows.to_parquet(tmp_path / "noise.parquet")
    arguments = {
        "classifier": save_classifier(tmp_path / "classifier"),
        "files": tmp_path / "noise.parquet",
        "grid_size": GRID,
        "hops": HOPS,
        "n_samples": "2 3",
        "num_images": 3,
        "output_file": tmp_path / "new" / "study.json",
        "plot": tmp_path / "new" / "study.png",
    }
    if num_patches:
        arguments["num_patches"] = num_patches
    line = " ".join(f"--{key} {value}" for key, value in arguments.items())
    monkeypatch.setattr(sys, "argv", ["study_sampling.py", *line.split()])
    study.main()
    report = json.loads((tmp_path / "new" / "study.json").read_text())
    assert report["num_images"] == 3
    for n in ("2", "3"):
        for name in ("pearson", "spearman"):
            values, found = report["per_image"][n][name], report["found"][n][name]
            assert len(values) == 3
            assert found["mean"] == pytest.approx(sum(values) / 3, abs=2e-4)
            assert min(values) - 1e-3 <= found["interval"][0] <= found["mean"] <= found["interval"][1]
    assert (tmp_path / "new" / "study.png").read_bytes().startswith(b"\x89PNG")
