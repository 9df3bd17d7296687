"""What a run says while it learns: unreadable images, trackers and pictures."""

import json

import datasets
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from tve_hf.pretrain import PretrainArguments, pretrain


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
    assert [event.step for event in events.Scalars("kept")] == [3, 6]
    assert [event.value for event in events.Scalars("spearman")] == pytest.approx(
        [row["spearman"] for row in log], abs=1e-5
    )
    assert {"loss", "removed", "learning_rate", "images/s", "epsilon", "fidelity_gap"} <= set(events.Tags()["scalars"])
    for row in log:
        width, height = Image.open(tmp_path / "run" / f"validation-{row['step']}.png").size
        assert width > 3 * 200 and height > 2 * 200  # three columns, two rows
