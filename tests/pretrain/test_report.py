"""What a run says while it learns: unreadable images, trackers and pictures."""

import json
import math

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import same_weights

from tve_hf.pretrain import PretrainArguments, loop, pretrain


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_images_stop_the_run_only_above_their_share(settings, broken_parquet, streamed, tmp_path, streaming):
    settings |= {"train_files": [str(broken_parquet)], "max_steps": 8, "validation_files": [str(broken_parquet)]}
    if streaming:  # of unknown length, a share of 1000 images is allowed
        settings |= streamed(broken_parquet) | {"max_bad_images": 0.0}
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


def test_trackers_and_pictures(settings, parquet, tmp_path):
    pytest.importorskip("tensorboard")
    settings |= {"validation_files": [str(parquet)], "validation_images": 2, "report_to": ["tensorboard"]}
    pretrain(PretrainArguments(**(settings | {"logging_steps": 3})))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = json.loads((tmp_path / "run" / "training.json").read_text())["log"]
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "pretrain"))
    events.Reload()
    for name in ("kept_loss", "spearman"):
        logged = [(row["step"], row[name]) for row in log if name in row]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, abs=1e-5)) for step, value in logged]
    assert {"loss", "learning_rate", "images_per_second", "epsilon", "fidelity_gap"} <= set(events.Tags()["scalars"])
    for step in (2, 4, 6):
        width, height = Image.open(tmp_path / "run" / f"validation-{step}.png").size
        assert width > 3 * 200 and height > 2 * 200  # three columns, two rows


def test_the_log_has_a_row_for_every_few_steps_and_every_checkpoint(settings, tmp_path, monkeypatch):
    """Each with the means of what the steps since the last one lost, whatever becomes of the run between them."""
    lost, take_step = [], loop.take_step

    def note(*arguments):
        lost.append(take_step(*arguments))
        return lost[-1]

    monkeypatch.setattr(loop, "take_step", note)
    pretrain(PretrainArguments(**(settings | {"logging_steps": 3, "save_steps": 4, "max_steps": 8})))
    log = json.loads((tmp_path / "run" / "training.json").read_text())["log"]
    assert [row["step"] for row in log] == [3, 4, 6, 8]
    assert [("images_per_second" in row) for row in log] == [False, True, False, True]
    for row, begun in zip(log, (0, 3, 4, 6), strict=True):
        kept, removed = torch.stack(lost[begun : row["step"]]).mean(0).tolist()
        assert (row["kept_loss"], row["removed_loss"]) == (
            pytest.approx(kept, rel=1e-4),
            pytest.approx(removed, rel=1e-4),
        )
        assert row["loss"] == pytest.approx(kept + removed, rel=1e-4)
    # Warm-up takes none of eight steps, and half a cosine falls over them.
    rates = [settings["learning_rate"] * (1 + math.cos(math.pi * row["step"] / 8)) / 2 for row in log]
    assert [row["learning_rate"] for row in log] == pytest.approx(rates, abs=1e-6)


def test_checkpoints_by_the_clock(settings, tmp_path, monkeypatch):
    """One after each step, for every step takes longer; none of them is a row of the log."""
    saved, save = [], loop.save

    def note(run):
        saved.append(run.done)
        save(run)

    monkeypatch.setattr(loop, "save", note)
    often = {"save_minutes": 1e-9, "save_steps": 4, "max_steps": 4}
    whole = pretrain(PretrainArguments(**(settings | often)))
    assert saved == [1, 2, 3, 4]
    assert len(json.loads((tmp_path / "run" / "training.json").read_text())["log"]) == 1
    AcceleratorState._reset_state(True)
    never = often | {"save_minutes": 0.0, "output_dir": str(tmp_path / "never")}
    assert same_weights(whole, pretrain(PretrainArguments(**(settings | never))))
    assert saved == [1, 2, 3, 4, 4]
    logs = [json.loads((tmp_path / run / "training.json").read_text())["log"][0] for run in ("run", "never")]
    assert logs[0]["loss"] == logs[1]["loss"]
