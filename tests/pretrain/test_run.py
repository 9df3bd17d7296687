"""A run is put together: images drawn at random, and the last checkpoint of a run with the same settings."""

import json
import logging

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from interruptions import before_step, fill_disk
from PIL import Image
from tiny import noise_image, same_weights, save_noise
from transformers import pipeline

import tve_hf
from tve_hf.pretrain import PretrainArguments, loop, pretrain


@pytest.mark.parametrize(
    ("killed_in_step", "normalized", "streaming"),
    [(3, False, False), (4, False, False), (6, False, False), (4, True, False), (4, True, True)],
)
def test_resumed_run_equals_an_uninterrupted_one(
    settings, parquet, streamed, tmp_path, monkeypatch, killed_in_step, normalized, streaming
):
    """To the bit; the variances of --normalize_labels are measured anew, on images and patches drawn as before."""
    settings["normalize_labels"] = normalized
    if streaming:
        settings |= streamed(parquet) | {"max_steps": 6, "shuffle_buffer": 3}
    whole = pretrain(PretrainArguments(**settings)).state_dict()
    settings["output_dir"] = str(tmp_path / "killed")
    steps, take_step = [], loop.take_step

    def take_or_kill(run, *arguments):
        steps.append(run.done + 1)
        if len(steps) == killed_in_step:
            raise KeyboardInterrupt
        return take_step(run, *arguments)

    monkeypatch.setattr(loop, "take_step", take_or_kill)
    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainArguments(**settings))
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    torch.manual_seed(99)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    saved = (killed_in_step - 1) // 2 * 2
    assert steps == [*range(1, killed_in_step + 1), *range(saved + 1, 7)]  # and not from the start again
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [json.loads((tmp_path / run / "training.json").read_text())["log"] for run in ("run", "killed")]
    for row in (*logs[0], *logs[1]):
        del row["images_per_second"]
    assert logs[0] == logs[1]
    again = pretrain(PretrainArguments(**settings)).state_dict()  # nothing is left to do
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_changed_settings_are_refused_by_name(whole, isolated, tmp_path, monkeypatch):
    settings = whole[0] | {"output_dir": str(tmp_path / "run")}
    monkeypatch.setattr(loop, "take_step", before_step(3, fill_disk))
    with pytest.raises(OSError):
        pretrain(PretrainArguments(**settings))
    AcceleratorState._reset_state(True)
    changed = settings | {"learning_rate": 0.5, "batch_size": 1, "save_steps": 3}
    with pytest.raises(ValueError) as caught:
        pretrain(PretrainArguments(**changed))
    message = str(caught.value)
    assert "learning_rate was 0.001 and is 0.5" in message and "batch_size was 2 and is 1" in message
    assert "save_steps" not in message and "another output_dir" in message


def test_old_checkpoints_without_settings_are_resumed(whole, isolated, tmp_path, monkeypatch):
    settings, weights, _ = whole
    settings = settings | {"output_dir": str(tmp_path / "run")}
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(loop, "take_step", before_step(4, fill_disk))
        pretrain(PretrainArguments(**settings))
    path = tmp_path / "run" / "checkpoint-2" / "progress.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({"step": saved["step"], "log": saved["log"]}))
    AcceleratorState._reset_state(True)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_images_and_those_of_variances_are_drawn_from_all_classes(
    settings, streamed, tmp_path, monkeypatch, streaming
):
    """Of files sorted by class: the first rows, black images, would say nothing of the others."""
    encoded = [datasets.Image().encode_example(Image.new("RGB", (8, 8), (row // 25 * 30,) * 3)) for row in range(200)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "held")}
    for path in files.values():
        datasets.Dataset.from_dict({"image": encoded}, features=features).to_parquet(path)
    settings |= {"train_files": [files["train"]], "validation_files": [files["held"]], "validation_images": 16}
    settings |= {"normalize_labels": True, "max_steps": 2}
    if streaming:
        settings |= streamed(files["train"]) | {"validation_files": [], "validation_split": "train"}
    seen = []

    def note(images, *arguments):
        seen.append(draw_images(images, *arguments))
        return seen[-1]

    draw_images = tve_hf.pretrain.run.draw_images
    monkeypatch.setattr(tve_hf.pretrain.run, "draw_images", note)
    pretrain(PretrainArguments(**settings))
    AcceleratorState._reset_state(True)
    pretrain(PretrainArguments(**(settings | {"output_dir": str(tmp_path / "again")})))
    of_variances, held_out = seen[:2]
    assert len(of_variances) == 64 and len(held_out) == 16
    assert len(of_variances.flatten(1)[:, 0].unique()) == 8 and len(held_out.flatten(1)[:, 0].unique()) > 3
    assert torch.equal(of_variances, seen[2]) and torch.equal(held_out, seen[3])


@pytest.mark.parametrize("streaming", [False, True])
def test_without_other_images_some_are_set_aside_and_measure_the_explainer(
    settings, streamed, tmp_path, monkeypatch, streaming
):
    """They are never decoded for a step, whether the run is stopped or not, and both end with the same bits."""
    save_noise(tmp_path / "noise.parquet", 24)
    settings |= {"train_files": [str(tmp_path / "noise.parquet")], "max_steps": 14, "save_steps": 7}
    if streaming:
        settings |= streamed(tmp_path / "noise.parquet") | {"shuffle_buffer": 24}
    trained, held, take_step, first_images = set(), [], loop.take_step, tve_hf.pretrain.run.first_images

    def bits(pixel_values):
        return {image.numpy().tobytes() for image in pixel_values}

    def note(run, batches, good):
        trained.update(*(bits(batch.pixel_values) for batch in batches))
        return take_step(run, batches, good)

    def note_held(*arguments):
        held.append(first_images(*arguments))
        return held[-1]

    monkeypatch.setattr(loop, "take_step", note)
    monkeypatch.setattr(tve_hf.pretrain.run, "first_images", note_held)
    whole = pretrain(PretrainArguments(**settings))
    (aside,) = map(bits, held)
    assert len(aside) == 3 and len(trained) == 21 and not aside & trained  # more than an epoch
    log = json.loads((tmp_path / "run" / "training.json").read_text())["log"]
    measured = {name: log[-1][name] for name in ("kept_error", "fidelity_gap", "exact_fidelity_gap")}
    saved = tve_hf.TVEConfig.from_pretrained(tmp_path / "run")
    assert saved.quality == whole.config.quality and {"num_images": 3, **measured}.items() <= saved.quality.items()

    settings["output_dir"] = str(tmp_path / "stopped")
    monkeypatch.setattr(loop, "take_step", before_step(10, fill_disk))
    AcceleratorState._reset_state(True)
    with pytest.raises(OSError):
        pretrain(PretrainArguments(**settings))
    monkeypatch.setattr(loop, "take_step", note)
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="number of images set aside was 3 and is 2"):
        pretrain(PretrainArguments(**(settings | {"validation_images": 2})))
    AcceleratorState._reset_state(True)
    resumed = pretrain(PretrainArguments(**settings))
    assert same_weights(whole, resumed) and resumed.config.quality == whole.config.quality
    assert bits(held[-1]) == aside and not aside & trained


def test_a_run_without_validation_says_so(settings, tmp_path, capsys):
    save_noise(tmp_path / "noise.parquet", 24)
    settings |= {"train_files": [str(tmp_path / "noise.parquet")], "max_steps": 1, "validation_images": 0}
    assert pretrain(PretrainArguments(**settings)).config.quality is None
    assert "was not measured" in capsys.readouterr().out.splitlines()[-2]


def test_a_short_run_does_not_look_like_a_good_one(settings, tmp_path, capsys, caplog, monkeypatch):
    """What it learnt in three steps is told at its end, in its card, and by a warning wherever it is used."""
    monkeypatch.setattr(logging.getLogger("tve_hf"), "propagate", True)
    save_noise(tmp_path / "noise.parquet", 24)
    settings |= {"train_files": [str(tmp_path / "noise.parquet")], "max_steps": 3, "backgrounds": "random"}
    settings |= {"learning_rate": 1e-4, "coalitions_per_image": 4}
    pretrain(PretrainArguments(**settings))
    told, following = capsys.readouterr().out.splitlines()[-2:]
    assert told.startswith(f"The explainer is in {tmp_path / 'run'}. On 3 held-out images the explainer accounts for ")
    assert told.endswith(", which is poor.") and "Next: tve-hf explain" in following and "--model" in following
    assert ", which is poor." in (tmp_path / "run" / "README.md").read_text()
    explain = pipeline("transferable-attribution", model=str(tmp_path / "run"), classifier=settings["classifier"])
    (warning,) = (record.getMessage() for record in caplog.records if "poor" in record.getMessage())
    assert "is poor: on 3 held-out images it accounts for" in warning and "Train it for more steps" in warning
    results = explain([noise_image(0), noise_image(1)])
    assert all(result["quality"] == explain.model.config.quality for (result,) in results)
    assert sum("poor" in record.getMessage() for record in caplog.records) == 1
