"""Settings that would fail later are refused before anything is loaded."""

import pytest
from datasets import Dataset

from tve_hf.pretrain import PretrainArguments, pretrain
from tve_hf.pretrain.batches import steps_of
from tve_hf.sources import Images


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
        ({"save_minutes": -1.0}, "save_minutes is -1.0, it must be 0, for none, or more"),
        ({"validation_images": -1}, "validation_images is -1, it must be 0, for none, or more"),
        ({"validation_images": 0, "validation_files": ["x"]}, "validation_images=0 asks for no validation; leave it"),
        ({"num_epochs": 0, "max_steps": -1}, "num_epochs and max_steps are both 0 or less; pass one of them"),
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


@pytest.mark.parametrize("max_steps", [0, -1])
def test_no_number_of_steps_is_said_as_the_trainer_says_it_or_by_zero(max_steps):
    args = PretrainArguments("", "", num_epochs=3, batch_size=2, max_steps=max_steps)
    rows = Dataset.from_dict({"image": ["a"] * 7})
    assert steps_of(args, Images(rows, "image", "rows", 7), world=1) == 9
    assert args.fixed()["max_steps"] == 0  # so that a run goes on under either
    with pytest.raises(ValueError, match="does not tell how many images it streams; pass max_steps"):
        steps_of(args, Images(rows.to_iterable_dataset(), "image", "rows", None), world=1)
