"""Pre-training on a parquet file of noise: Eq. 8 by hand, resuming, and what is left on disk."""

import errno
import json
import logging
import multiprocessing
import os
import pkgutil
import resource
import signal

import datasets
import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tiny import GRID, HOPS, RUN, SIDE, noise_image, save_classifier
from transformers import (
    AutoImageProcessor,
    AutoModel,
    ViTForImageClassification,
    get_cosine_schedule_with_warmup,
    pipeline,
)

import tve_hf
from tve_hf.cli import main
from tve_hf.patches import sample_patches
from tve_hf.pretrain import PretrainArguments, pretrain

NUM_IMAGES = 7


pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "noise.parquet"
    features = datasets.Features({"image": datasets.Image(), "name": datasets.Value("string")})
    rows = {"image": [noise_image(seed) for seed in range(NUM_IMAGES)], "name": ["x"] * NUM_IMAGES}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.fixture
def settings(classifier, parquet, tmp_path):
    return {
        "classifier": str(classifier),
        "train_files": [str(parquet)],
        "output_dir": str(tmp_path / "run"),
    } | RUN


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
    terms = [torch.cat(found).double().numpy() for found in (kept_terms, removed_terms)]  # (images x patches, D) each
    weights = [1, 1]
    if normalized:  # each dimension by its own variance, or by a hundredth of the mean one
        variances = [found.var(0, ddof=1) for found in terms]
        both = (variances[0].mean() + variances[1].mean()) / 2
        weights = [both / np.maximum(variance, variance.mean() / 100) for variance in variances]
    assert row["step"] == 1
    for name, found, weight in zip(("kept_loss", "removed_loss"), terms, weights, strict=True):
        assert row[name] == pytest.approx((found**2 * weight).sum(1).mean(), rel=1e-4)


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


@pytest.mark.parametrize(("killed_in_step", "normalized"), [(3, False), (4, False), (6, False), (4, True)])
def test_resumed_run_equals_an_uninterrupted_one(settings, tmp_path, monkeypatch, killed_in_step, normalized):
    settings["normalize_labels"] = normalized
    whole = pretrain(PretrainArguments(**settings)).state_dict()
    settings["output_dir"] = str(tmp_path / "killed")
    sample, steps = tve_hf.pretraining_labels.sample_patches, []

    def kill(*arguments):
        steps.append(1)
        if len(steps) == killed_in_step:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(tve_hf.pretraining_labels, "sample_patches", kill)
    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainArguments(**settings))
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    torch.manual_seed(99)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    saved = (killed_in_step - normalized - 1) // 2 * 2  # each start draws once more to measure the variances
    assert len(steps) == killed_in_step + normalized + 6 - saved  # and not from the start again
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [json.loads((tmp_path / run / "training.json").read_text())["log"] for run in ("run", "killed")]
    for row in (*logs[0], *logs[1]):
        del row["images_per_second"]
    assert logs[0] == logs[1]
    again = pretrain(PretrainArguments(**settings)).state_dict()  # nothing is left to do
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("cached", [False, True])
def test_draws_are_those_of_algorithm_1_by_hand(settings, classifier, tmp_path, monkeypatch, cached):
    """A plain loop with the documented seeds gives the same weights to the bit: a command stays reproducible."""
    calls = []

    def count(*arguments):
        calls.append(1)
        return tve_hf.exact_meta_attribution(*arguments)

    monkeypatch.setattr(tve_hf.pretraining_labels, "exact_meta_attribution", count)
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
            kept, removed = (torch.stack(found) for found in zip(*map(labels.get, numbers), strict=True))
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
    found = {
        "accumulated": {"batch_size": 1, "gradient_accumulation_steps": 4},
        "two processes": {"batch_size": 2},
        "both": {"batch_size": 1, "gradient_accumulation_steps": 2},
    }
    for name, sizes in list(found.items())[2 * cached :]:
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


@pytest.fixture
def broken_parquet(tmp_path):
    """Eight images, of which number 2 is none."""
    rows = [datasets.Image().encode_example(noise_image(seed)) for seed in range(8)]
    rows[2] = {"bytes": b"no image", "path": "holiday.jpg"}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(tmp_path / "broken.parquet")
    return tmp_path / "broken.parquet"


def as_saved_folder(parquet, folder):
    """Settings to stream the images from a folder of `save_to_disk`: a stream of parquet sleeps 5 s at each end."""
    datasets.Dataset.from_parquet(str(parquet)).save_to_disk(folder)
    return {"train_files": [], "dataset_name": str(folder), "streaming": True}


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_images_stop_the_run_only_above_their_share(settings, broken_parquet, tmp_path, streaming):
    settings |= {"train_files": [str(broken_parquet)], "max_steps": 8, "validation_files": [str(broken_parquet)]}
    if streaming:  # of unknown length, a share of 1000 images is allowed
        settings |= as_saved_folder(broken_parquet, tmp_path / "saved") | {"max_bad_images": 0.0}
    with pytest.raises(ValueError, match="1 images could not be read, more than max_bad_images=.*: holiday.jpg. Mend"):
        pretrain(PretrainArguments(**settings))
    AcceleratorState._reset_state(True)
    pretrain(PretrainArguments(**(settings | {"max_bad_images": 0.2, "output_dir": str(tmp_path / "again")})))
    report = json.loads((tmp_path / "again" / "training.json").read_text())["bad_images"]
    assert report["number"] == 1 and "PIL" in report["first"]["holiday.jpg"]  # twice met, once counted
    assert "| unreadable images, skipped | 1 |" in (tmp_path / "again" / "README.md").read_text()


def test_no_readable_image_is_said(settings, tmp_path):
    features = datasets.Features({"image": datasets.Value("binary")})
    rows = {"image": [b"broken"] * 4}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "none.parquet")
    settings |= {"train_files": [str(tmp_path / "none.parquet")], "max_bad_images": 1.0}
    with pytest.raises(ValueError, match="No image of step 1 could be read; mend .*none.parquet"):
        pretrain(PretrainArguments(**settings))


def in_a_fork(function):
    """Run in a forked process; return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(120)
    process.kill()
    return process.exitcode


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number, then, function):
    """A stand-in for `function` that does `then` instead at one of its calls."""
    calls = []

    def stand_in(*arguments, **options):
        calls.append(1)
        return (then if len(calls) == number else function)(*arguments, **options)

    return stand_in


# Where a run of six steps and three checkpoints is killed: what stands for which function, at which call.
KILLS = {
    "in a step": ("tve_hf.pretraining_labels.sample_patches", 4),
    "before a checkpoint": ("accelerate.Accelerator.save_state", 2),
    "weights written": ("accelerate.checkpointing.torch.save", 5),
    "all but progress written": ("tve_hf.checkpointing.settle", 2),
    "before the rename": ("tve_hf.checkpointing.os.replace", 2),
    "after the rename": ("tve_hf.checkpointing.os.replace", 3),
    "removing the old one": ("tve_hf.checkpointing.shutil.rmtree", 1),
    "writing the explainer": ("tve_hf.TVEExplainer.save_pretrained", 1),
    "moving the explainer": ("tve_hf.pretrain.os.replace", 2),
}


@pytest.fixture(scope="module")
def whole(classifier, parquet, tmp_path_factory):
    """Settings of a run, and the weights that it ends with if nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    sizes = {"grid_size": GRID, "hops": HOPS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    steps = {"patches_per_image": 3, "batch_size": 2, "mixed_precision": "no", "save_steps": 2}
    settings = {"classifier": str(classifier), "train_files": [str(parquet)]} | sizes | steps
    trained = pretrain(PretrainArguments(**settings, output_dir=str(folder / "run")))
    return settings, trained.state_dict(), (folder / "run" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("moment", KILLS)
def test_killed_at_any_moment_it_ends_with_the_same_weights(whole, tmp_path, monkeypatch, moment):
    settings, weights, file = whole
    settings = settings | {"output_dir": str(tmp_path / "run")}
    place, number = KILLS[moment]

    def killed():
        owner, _, name = place.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        setattr(owner, name, at_call(number, die, getattr(owner, name)))
        pretrain(PretrainArguments(**settings))

    assert in_a_fork(killed) == -signal.SIGKILL
    assert list((tmp_path / "run").glob("checkpoint-*[0-9]"))
    torch.manual_seed(99)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == file
    assert not list((tmp_path / "run").glob("*.partial*"))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


def test_killed_while_it_keeps_labels_it_ends_with_the_same_weights(whole, tmp_path):
    """The 2nd row is written before any checkpoint, the 6th in the last step of the first epoch, the 7th after it."""
    settings = whole[0] | {"cache_labels": True}
    weights = pretrain(PretrainArguments(**settings, output_dir=str(tmp_path / "whole"))).state_dict()
    write = os.pwrite

    def die_halfway(file, row, place):
        write(file, row[: len(row) // 2], place)
        die()

    for number in (2, 6, 7):
        AcceleratorState._reset_state(True)
        run = PretrainArguments(**settings, output_dir=str(tmp_path / f"{number}"))

        def killed(run=run, number=number):
            os.pwrite = at_call(number, die_halfway, write)
            pretrain(run)

        assert in_a_fork(killed) == -signal.SIGKILL
        assert (tmp_path / f"{number}" / "labels.f16").stat().st_size > 0
        torch.manual_seed(99)
        resumed = pretrain(run).state_dict()
        assert all(torch.equal(weights[name], resumed[name]) for name in weights), number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("streaming", [False, True])
def test_signals_save_and_end(settings, parquet, tmp_path, number, streaming):
    if streaming:
        settings |= as_saved_folder(parquet, tmp_path / "saved")
    settings |= {"max_steps": 6, "shuffle_buffer": 3, "dataloader_num_workers": 1}
    expected = pretrain(PretrainArguments(**settings)).state_dict()
    settings["output_dir"] = str(tmp_path / "stopped")

    def signalled():
        def send(*arguments):
            os.killpg(os.getpgrp(), number)  # as a scheduler does: the workers get it too
            return sample_patches(*arguments)

        os.setpgrp()
        tve_hf.pretraining_labels.sample_patches = at_call(4, send, sample_patches)
        pretrain(PretrainArguments(**settings))

    assert in_a_fork(signalled) == 128 + number
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (tmp_path / "stopped" / "training.json").exists()
    AcceleratorState._reset_state(True)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    logs = [json.loads((tmp_path / run / "training.json").read_text())["log"] for run in ("run", "stopped")]
    for row in (*logs[0], *logs[1]):
        del row["images_per_second"]
    assert logs[0] == logs[1]
    assert signal.getsignal(number) is not None and "Signals" not in repr(signal.getsignal(number))


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["accelerate.checkpointing.torch.save", "tve_hf.checkpointing.os.replace"])
def test_a_full_disk_leaves_the_last_checkpoint(whole, tmp_path, monkeypatch, name):
    settings, weights, _ = whole
    settings = settings | {"output_dir": str(tmp_path / "run")}
    owner, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, at_call(5 if "torch" in name else 2, full, getattr(owner, attribute)))
        with pytest.raises(OSError, match="step 4 could not .*No space left.*checkpoint-2 is intact. Free"):
            pretrain(PretrainArguments(**settings))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    AcceleratorState._reset_state(True)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)


def test_a_limit_on_file_size_is_a_full_disk_too(whole, tmp_path):
    """No stand-in: the system itself refuses to write more than 20 KB in a file, by whichever library."""
    settings = whole[0] | {"output_dir": str(tmp_path / "run")}
    told = tmp_path / "told"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            pretrain(PretrainArguments(**settings))
        except OSError as error:
            told.write_text(str(error))
            raise SystemExit(7) from error

    assert in_a_fork(limited) == 7
    assert "checkpoint of step 2 could not be written" in told.read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_changed_settings_are_refused_by_name(whole, tmp_path, monkeypatch):
    settings = whole[0] | {"output_dir": str(tmp_path / "run")}
    monkeypatch.setattr(tve_hf.pretraining_labels, "sample_patches", at_call(3, full, sample_patches))
    with pytest.raises(OSError):
        pretrain(PretrainArguments(**settings))
    AcceleratorState._reset_state(True)
    changed = settings | {"learning_rate": 0.5, "batch_size": 1, "save_steps": 3}
    with pytest.raises(ValueError) as caught:
        pretrain(PretrainArguments(**changed))
    message = str(caught.value)
    assert "learning_rate was 0.001 and is 0.5" in message and "batch_size was 2 and is 1" in message
    assert "save_steps" not in message and "another output_dir" in message


def test_old_checkpoints_without_settings_are_resumed(whole, tmp_path, monkeypatch):
    settings, weights, _ = whole
    settings = settings | {"output_dir": str(tmp_path / "run")}
    monkeypatch.setattr(tve_hf.pretraining_labels, "sample_patches", at_call(4, full, sample_patches))
    with pytest.raises(OSError):
        pretrain(PretrainArguments(**settings))
    path = tmp_path / "run" / "checkpoint-2" / "progress.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({"step": saved["step"], "log": saved["log"]}))
    AcceleratorState._reset_state(True)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)


def test_checkpoints_to_keep(settings, tmp_path):
    pretrain(PretrainArguments(**(settings | {"save_total_limit": 2})))
    names = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert names == {"checkpoint-4", "checkpoint-6"}


def test_fine_tuning_on_a_fine_tuned_backbone(settings, classifier, tmp_path, caplog):
    first = pretrain(PretrainArguments(**settings))
    AcceleratorState._reset_state(True)
    model = ViTForImageClassification.from_pretrained(classifier)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "tuned")
    AutoImageProcessor.from_pretrained(classifier).save_pretrained(tmp_path / "tuned")
    given = {name: value for name, value in settings.items() if name not in ("grid_size", "hops", "hidden_size")}
    given |= {"classifier": str(tmp_path / "tuned"), "explainer": str(tmp_path / "run"), "num_epochs": 1}
    given |= {"output_dir": str(tmp_path / "ft"), "learning_rate": 1e-6, "num_attention_heads": 4}
    given["num_attention_heads"] = 2
    with caplog.at_level("WARNING"):
        logging.getLogger("tve_hf").addHandler(caplog.handler)
        tuned = pretrain(PretrainArguments(**given))
        logging.getLogger("tve_hf").removeHandler(caplog.handler)
    assert "other backbone weights" in caplog.text
    split = tve_hf.split_classifier(tmp_path / "tuned")
    saved = AutoModel.from_pretrained(tmp_path / "ft")
    assert saved.config.backbone_fingerprint == split.fingerprint() != first.config.backbone_fingerprint
    assert saved.config.backbone_name == "tuned"
    empty = split.embed(torch.zeros(1, 3, SIDE, SIDE))[0]
    assert torch.allclose(saved.empty_embedding, empty, rtol=1e-3, atol=1e-3)
    for name, weight in first.named_parameters():  # a start from the old weights, hardly moved
        assert torch.allclose(tuned.get_parameter(name), weight, atol=1e-2), name
    report = json.loads((tmp_path / "ft" / "training.json").read_text())
    assert report["arguments"]["grid_size"] == GRID and report["arguments"]["hidden_size"] == 16
    with pytest.raises(ValueError, match="has hops=1; leave hops=0 out"):
        pretrain(PretrainArguments(**(given | {"hops": 0, "output_dir": str(tmp_path / "other")})))


def test_trackers_and_pictures(settings, parquet, tmp_path):
    pytest.importorskip("tensorboard")
    settings |= {"validation_files": [str(parquet)], "validation_images": 2, "report_to": ["tensorboard"]}
    pretrain(PretrainArguments(**(settings | {"logging_steps": 3})))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = json.loads((tmp_path / "run" / "training.json").read_text())["log"]
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "pretrain"))
    events.Reload()
    assert [event.step for event in events.Scalars("kept")] == [3, 6]
    assert [event.value for event in events.Scalars("spearman")] == pytest.approx(
        [row["spearman"] for row in log], abs=1e-5
    )
    assert {"loss", "removed", "learning_rate", "images/s", "epsilon", "fidelity_gap"} <= set(events.Tags()["scalars"])
    for row in log:
        width, height = Image.open(tmp_path / "run" / f"validation-{row['step']}.png").size
        assert width > 3 * 200 and height > 2 * 200  # three columns, two rows


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_column": "photo"}, "No column 'photo'.*choose image_column among image, name"),
        ({"batch_size": 64}, "fewer images than one batch of 64; lower batch_size"),
        ({"patches_per_image": 17}, "patches_per_image=17 is more than the 16 patches of a grid of 4 x 4; lower it"),
        ({"train_files": []}, "either as train_files or as dataset_name"),
        ({"dataset_name": "x"}, "either as train_files or as dataset_name"),
        ({"validation_split": "test"}, "pass validation_files beside train_files"),
        ({"save_steps": 0}, "save_steps is 0, it must be at least 1"),
        ({"max_bad_images": 2.0}, "a share between 0 and 1"),
        ({"cache_labels": True, "streaming": True}, "images that stay as they are; leave it or streaming out"),
        ({"cache_labels": True, "random_resized_crop": True}, "leave it or random_resized_crop out"),
        ({"report_to": ["clipboard"]}, "Unknown tracker 'clipboard'.*tensorboard"),
        ({"report_to": ["dvclive"]}, "'dvclive' in report_to is not installed; run `pip install dvclive`"),
    ],
)
def test_mistakes_are_named(settings, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        pretrain(PretrainArguments(**(settings | changed)))
    assert not list(tmp_path.glob("run/*"))


def test_a_place_that_cannot_be_written_is_named_at_the_start(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Nothing can be written in output_dir .*file.*; choose another"):
        pretrain(PretrainArguments(**(settings | {"output_dir": str(tmp_path / "file" / "run")})))


@pytest.mark.slow
def test_compiled(settings, tmp_path):
    plain = pretrain(PretrainArguments(**settings))
    AcceleratorState._reset_state(True)
    settings |= {"torch_compile": True, "output_dir": str(tmp_path / "compiled")}
    compiled = pretrain(PretrainArguments(**settings))
    for name, weight in plain.state_dict().items():
        assert torch.allclose(weight, compiled.state_dict()[name], atol=1e-3), name
