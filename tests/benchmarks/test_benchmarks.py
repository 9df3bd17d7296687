"""The scripts in `benchmarks/` run, and count what they say they count; what they time is not tested."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_classifier, save_noise

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"


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


def test_profile_counts_the_operations_of_the_first_step() -> None:
    profile = runpy.run_path(str(ROOT / "pretrain_profile.py"), run_name="profile")["Profile"]()
    step = profile.end_of_step(lambda rows: torch.ones(rows, 8) @ torch.ones(8, 2))
    assert step(4).shape == (4, 2) and step(5).shape == (5, 2)
    assert profile.operations == 2 * 4 * 8 * 2
    assert len(profile.ends) == len(profile.memory) == 2


def test_profile_of_a_run(tmp_path, monkeypatch, capsys, isolated) -> None:
    from tiny import save_run

    from tve_hf.pretrain import loop as pretrain

    for name in ("exact_labels", "batches_of", "take_step"):
        monkeypatch.setattr(pretrain, name, getattr(pretrain, name))  # put back what the script replaces
    arguments = []
    for name, value in (save_run(tmp_path) | {"output_dir": str(tmp_path / "run")}).items():
        arguments += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    monkeypatch.setattr(sys, "argv", ["pretrain_profile.py", *arguments])
    runpy.run_path(str(ROOT / "pretrain_profile.py"), run_name="__main__")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["steps"] == 8 and "pretrain_profile.py --classifier " in report["command"]
    assert sum(report["share"].values()) == pytest.approx(1, abs=0.01)
    assert min(report["share"].values()) > 0


def test_operations_and_memory_are_counted_without_a_pass() -> None:
    script = runpy.run_path(str(ROOT / "imagenet_cost.py"), run_name="cost")

    class Chain(torch.nn.Sequential):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return super().forward(rows)

    with torch.device("meta"):
        chain = Chain(torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 2, bias=False), torch.nn.Linear(2, 1))
        operations, peak = script["cost"](chain, rows=torch.empty(3, 4))
    assert operations == 2 * 3 * (4 * 8 + 8 * 2 + 2 * 1)
    assert peak == 4 * 3 * (8 + 2)  # the first layer's output is gone before the third's is made


def test_hours_of_imagenet_are_those_of_its_passes(tmp_path, monkeypatch, capsys) -> None:
    table = tmp_path / "timm.csv"
    rows = [f"{name}_224,{rate}" for name, rate in (("vit_base_patch16", 1000), ("deit_base_patch16", 500))]
    table.write_text("\n".join(["model,infer_samples_per_sec", *rows, "swin_base_patch4_window7_224,2000"]))
    monkeypatch.setattr(sys, "argv", ["imagenet_cost.py", "--patches_per_image", "8", "--measured", f"GPU={table}"])
    runpy.run_path(str(ROOT / "imagenet_cost.py"), run_name="__main__")
    for row, rate in zip(capsys.readouterr().out.splitlines()[2:], (1000, 500, 2000), strict=True):
        *_, share, _, one, eight = (cell.strip() for cell in row.strip("|").split("|"))
        passes = 1_281_167 * 17 / rate / 3600
        assert float(one) == pytest.approx(passes / (float(share.strip("%")) / 100), rel=0.01)
        assert float(eight) == pytest.approx(float(one) / 8, abs=0.006)


def test_growth_of_operations_follows_from_the_shapes(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    from tve_hf.cli.bench import _RANDOM

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(_RANDOM, "tiny", ("vit", sizes | {"intermediate_size": 48}))
    arguments = ["--classifiers", "tiny", "--repeats", "2", "--hidden_size", "16", "--output_dir", str(tmp_path)]
    arguments += ["--image_size", "64", "--grid_size", "--num_labels", "10", "20", "30", "--batch_size", "1", "3"]
    monkeypatch.setattr(sys, "argv", ["growth.py", *arguments])
    script = runpy.run_path(str(ROOT / "growth.py"))
    script["main"]()
    rows = json.loads((tmp_path / "growth.json").read_text())
    assert (tmp_path / "growth.png").stat().st_size
    of = {(row["setting"], row["value"]): row["gflops"] for row in rows}
    assert len(of) == 6 and of["batch_size", 1] == pytest.approx(of["batch_size", 3])  # of an image
    ten = of["num_labels", 20] - of["num_labels", 10]
    assert ten == pytest.approx(of["num_labels", 30] - of["num_labels", 20])
    # For each class a product of 16 hidden numbers for each of 14 x 14 patches, and three of their mean: the mean of
    # these products, what all patches share, and base.
    assert ten * 1e9 == pytest.approx(10 * 2 * 16 * (14 * 14 + 3))


def test_compiled_passes_are_timed_in_turns(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    main = runpy.run_path(str(ROOT / "compiled.py"), run_name="benchmark")["main"]
    threads = torch.get_num_threads()
    try:
        main([str(save_classifier(tmp_path / "classifier")), "--num_masks", "6", "--repeats", "3"])
    finally:
        torch.set_num_threads(threads)
    (found,) = json.loads(capsys.readouterr().out)["measured"].values()
    assert len(found["ratios"]) == 3 and found["ratio"] == sorted(found["ratios"])[1]
