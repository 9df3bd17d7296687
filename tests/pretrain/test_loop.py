"""Pre-training on a parquet file of noise: Eq. 8 and Algorithm 1 by hand, processes, signals, the way of a step."""

import json
import os
import signal
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from interruptions import before_step, in_a_fork
from safetensors.torch import load_file
from tiny import GRID, HOPS, SIDE, noise_image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    ViTForImageClassification,
    get_cosine_schedule_with_warmup,
    pipeline,
)

import tve_hf
from tve_hf.cli import main
from tve_hf.pretrain import PretrainArguments, loop, pretrain

NUM_IMAGES = 7  # of `parquet`
MAX_FILES = 8


@pytest.mark.parametrize(("normalized", "cached"), [(False, False), (True, False), (False, True)])
def test_first_loss_is_equation_8(settings, classifier, tmp_path, normalized, cached):
    """An untrained explainer predicts G(empty image) and G(x), so its loss needs no explainer to be computed."""
    options = {"batch_size": NUM_IMAGES, "patches_per_image": GRID * GRID, "num_epochs": 1, "flip": False}
    options |= {"normalize_labels": normalized, "cache_labels": cached}
    pretrain(PretrainArguments(**(settings | options)))
    (row,) = json.loads((tmp_path / "run" / "training.json").read_text())["log"]

    model = ViTForImageClassification.from_pretrained(classifier)
    processor = AutoImageProcessor.from_pretrained(classifier)
    pixel_values = processor([noise_image(seed) for seed in range(NUM_IMAGES)], return_tensors="pt")["pixel_values"]
    patch = SIDE // GRID

    @torch.no_grad()
    def embed(images):
        return model.vit(images).last_hidden_state[:, 0]

    kept_terms, removed_terms = [], []
    for row_of_patch in range(GRID):
        for column in range(GRID):
            near = torch.zeros(SIDE, SIDE)
            top, left = max(0, row_of_patch - HOPS) * patch, max(0, column - HOPS) * patch
            near[top : (row_of_patch + HOPS + 1) * patch, left : (column + HOPS + 1) * patch] = 1
            g, h = embed(pixel_values * near), embed(pixel_values * (1 - near))
            kept_terms.append(g - embed(torch.zeros(1, 3, SIDE, SIDE)))
            removed_terms.append(h - embed(pixel_values))
    terms = [torch.cat(rows).double().numpy() for rows in (kept_terms, removed_terms)]  # (images x patches, D) each
    weights = [1, 1]
    if normalized:  # each dimension by its own variance, or by a hundredth of the mean one
        variances = [term.var(0, ddof=1) for term in terms]
        both = (variances[0].mean() + variances[1].mean()) / 2
        weights = [both / np.maximum(variance, variance.mean() / 100) for variance in variances]
    assert row["step"] == 1
    for name, term, weight in zip(("kept_loss", "removed_loss"), terms, weights, strict=True):
        assert row[name] == pytest.approx((term**2 * weight).sum(1).mean(), rel=1e-4)


def test_two_epochs_leave_an_explainer_that_explains(settings, classifier, parquet, tmp_path):
    settings |= {"validation_files": [str(parquet)], "validation_images": 2}
    trained = pretrain(PretrainArguments(**settings))
    report = json.loads((tmp_path / "run" / "training.json").read_text())
    assert report["arguments"] == settings | report["arguments"]
    log = report["log"]
    assert [row["step"] for row in log] == [2, 4, 6]
    assert log[-1]["kept_loss"] < log[0]["kept_loss"]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in log)
    assert {"kept_error", "removed_error", "spearman"} < set(log[0])
    saved = AutoModel.from_pretrained(tmp_path / "run")
    assert saved.dtype == torch.float32 and not saved.training
    assert saved.config.backbone_fingerprint == tve_hf.split_classifier(classifier).fingerprint()
    for name, weight in trained.state_dict().items():  # rounded to half precision on disk
        assert torch.allclose(saved.state_dict()[name], weight, rtol=1e-3, atol=1e-6), name
    explain = pipeline("transferable-attribution", model=str(tmp_path / "run"), classifier=str(classifier))
    assert explain(noise_image(0))[0]["attribution"].shape == (GRID, GRID)


@pytest.mark.parametrize("cached", [False, True])
def test_draws_are_those_of_algorithm_1_by_hand(settings, classifier, tmp_path, monkeypatch, cached):
    """A plain loop with the documented seeds gives the same weights to the bit: a command stays reproducible."""
    calls, exact_labels = [], loop.exact_labels

    def count(*arguments):
        calls.append(1)
        return exact_labels(*arguments)

    monkeypatch.setattr(loop, "exact_labels", count)
    trained = pretrain(PretrainArguments(**(settings | {"seed": 4, "cache_labels": cached})))
    assert not (tmp_path / "run" / "labels.f16").exists()
    labels = {}  # number of an image -> its kept and removed
    model = tve_hf.split_classifier(classifier)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(4)
    explainer = tve_hf.TVEExplainer(tve_hf.pretrain.config_for(model, GRID, HOPS, **sizes)).train()
    with torch.no_grad():
        explainer.empty_embedding.copy_(model.embed(torch.zeros(2, 3, SIDE, SIDE))[0])
    groups = [[p for p in explainer.parameters() if (p.ndim > 1) is many] for many in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.05}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-2
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 6)
    images = [noise_image(seed) for seed in range(NUM_IMAGES)]
    for step in range(6):
        epoch, place = divmod(step, 3)
        order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(4 + epoch)).tolist()
        numbers = order[2 * place : 2 * place + 2]
        chosen = [images[number] for number in numbers]
        pixel_values = model.image_processor(chosen, return_tensors="pt")["pixel_values"]
        if cached:  # an image has its own seed, in every epoch
            generators = [torch.Generator().manual_seed(4 * NUM_IMAGES + number) for number in numbers]
            flips = torch.cat([torch.rand(1, generator=generator) for generator in generators]) < 0.5
            drawn = torch.cat([torch.rand(1, GRID * GRID, generator=generator) for generator in generators])
        else:
            generator = torch.Generator().manual_seed(4 * 6 + step)
            flips = torch.rand(2, generator=generator) < 0.5
            drawn = torch.rand(2, GRID * GRID, generator=generator)
        for row, flipped in enumerate(flips):
            if flipped:
                pixel_values[row] = pixel_values[row].flip(-1)
        patch_idx = drawn.argsort(1)[:, :3]
        with torch.no_grad():
            seen = model(pixel_values)
        if not (cached and labels.keys() >= set(numbers)):
            kept, removed = tve_hf.exact_meta_attribution(model, pixel_values, GRID, HOPS, patch_idx)
            calls.pop()
        if cached:
            labels = {number: (kept[row].half(), removed[row].half()) for row, number in enumerate(numbers)} | labels
            kept, removed = (torch.stack(part) for part in zip(*map(labels.get, numbers), strict=True))
        inputs = {"features": seen.features, "embeddings": seen.embeddings, "patch_idx": patch_idx}
        explainer(pixel_values, **inputs, kept_labels=kept, removed_labels=removed).loss.backward()
        torch.nn.utils.clip_grad_norm_(explainer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert all(torch.equal(weight, explainer.state_dict()[name]) for name, weight in trained.state_dict().items())
    assert calls == []  # as many times as here, with a cache hardly after the first epoch
    assert not cached or len(labels) == NUM_IMAGES


def test_checkpoints_hold_no_weight_of_the_backbone(settings, tmp_path):
    trained = pretrain(PretrainArguments(**settings))
    own = set(trained.state_dict())
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-6"):
        assert set(load_file(folder / "model.safetensors")) == own
    held = sum(p.numel() for p in trained.parameters())
    moments = torch.load(tmp_path / "run" / "checkpoint-6" / "optimizer.bin", weights_only=True)["state"].values()
    assert sum(state["exp_avg"].numel() for state in moments) == held


def on_two_processes(settings, folder):
    """Run in two forked processes that talk through gloo, as `accelerate launch` would start them."""
    datasets.disable_progress_bars()
    debug_launcher(lambda: pretrain(PretrainArguments(**settings, output_dir=str(folder))), num_processes=2)
    return load_file(folder / "checkpoint-6" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_processes_and_accumulation_do_not_change_the_result(settings, broken_parquet, tmp_path, cached):
    """Also where one process has fewer readable images than the other: every image weighs the same."""
    settings |= {"cache_labels": cached}
    settings |= {"train_files": [str(broken_parquet)], "max_bad_images": 0.5, "num_epochs": 3, "save_steps": 3}
    settings.pop("output_dir")
    whole = pretrain(PretrainArguments(**(settings | {"batch_size": 4}), output_dir=str(tmp_path / "whole")))
    AcceleratorState._reset_state(True)
    shared_out = {
        "accumulated": {"batch_size": 1, "gradient_accumulation_steps": 4},
        "two processes": {"batch_size": 2},
        "both": {"batch_size": 1, "gradient_accumulation_steps": 2},
    }
    for name, sizes in list(shared_out.items())[2 * cached :]:
        folder = tmp_path / name
        if name == "accumulated":
            pretrain(PretrainArguments(**(settings | sizes), output_dir=str(folder)))
            AcceleratorState._reset_state(True)
            weights = load_file(folder / "checkpoint-6" / "model.safetensors")
        else:
            weights = on_two_processes(settings | sizes, folder)
        for key, weight in whole.state_dict().items():
            assert torch.allclose(weights[key], weight, rtol=1e-3, atol=1e-4), (name, key)
        logs = [json.loads((tmp_path / n / "training.json").read_text())["log"][0] for n in ("whole", name)]
        assert logs[0]["kept_loss"] == pytest.approx(logs[1]["kept_loss"], rel=1e-4)
        assert json.loads((folder / "training.json").read_text())["bad_images"]["number"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("streaming", [False, True])
def test_signals_save_and_end(settings, parquet, streamed, tmp_path, number, streaming):
    if streaming:
        settings |= streamed(parquet)
    settings |= {"max_steps": 6, "shuffle_buffer": 3, "dataloader_num_workers": 1, "logging_steps": 1}
    expected = pretrain(PretrainArguments(**settings)).state_dict()
    settings["output_dir"] = str(tmp_path / "stopped")

    def signalled():
        os.setpgrp()
        # As a scheduler does: the workers get it too.
        loop.take_step = before_step(4, lambda: os.killpg(os.getpgrp(), number))
        pretrain(PretrainArguments(**settings))

    assert in_a_fork(signalled) == 128 + number
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (tmp_path / "stopped" / "training.json").exists()
    AcceleratorState._reset_state(True)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    logs = [json.loads((tmp_path / run / "training.json").read_text())["log"] for run in ("run", "stopped")]
    for row in (*logs[0], *logs[1]):
        row.pop("images_per_second", None)
    assert logs[0] == logs[1] and len(logs[0]) == 6
    assert signal.getsignal(number) is not None and "Signals" not in repr(signal.getsignal(number))


@pytest.mark.slow
def test_compiled(settings, tmp_path):
    plain = pretrain(PretrainArguments(**settings))
    AcceleratorState._reset_state(True)
    settings |= {"torch_compile": True, "output_dir": str(tmp_path / "compiled")}
    compiled = pretrain(PretrainArguments(**settings))
    for name, weight in plain.state_dict().items():
        assert torch.allclose(weight, compiled.state_dict()[name], atol=1e-3), name


def test_command_line(settings, tmp_path):
    arguments = []
    for name, value in settings.items():
        arguments += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    assert main(["pretrain", *arguments, "--num_epochs", "1"]) == 0
    assert isinstance(AutoModel.from_pretrained(tmp_path / "run"), tve_hf.TVEExplainer)


def test_grid_that_does_not_divide_the_image_ends_in_one_sentence(settings, capsys):
    arguments = ["--classifier", settings["classifier"], "--train_files", *settings["train_files"]]
    assert main(["pretrain", *arguments, "--output_dir", settings["output_dir"], "--grid_size", "5"]) == 1
    assert "tve-hf: " in capsys.readouterr().err.splitlines()[-1]


def test_a_step_passes_few_files(settings, monkeypatch):
    """Of a run that is set up: drawing, labels by the frozen G, the loss and its gradients, and the update."""
    package, take_step, passed = str(Path(tve_hf.__file__).parent), loop.take_step, set()

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            passed.add(os.path.relpath(frame.f_code.co_filename, package))

    def traced(run, *arguments):
        if run.done == 1:
            sys.setprofile(note)
        try:
            return take_step(run, *arguments)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(loop, "take_step", traced)
    pretrain(PretrainArguments(**(settings | {"max_steps": 3})))
    assert {"pretrain/loop.py", "pretrain/labels.py", "classifiers/model.py", "modeling_tve.py"} <= passed
    assert len(passed) <= MAX_FILES, sorted(passed)
