"""The callback of the Trainer, in a real training of a tiny ViT, and what its trackers then hold."""

import copy
import inspect
import re
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import noise_image, same_weights, save_classifier
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

import tve_hf

IMAGES = [noise_image(seed) for seed in range(3)]
pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = save_classifier(tmp_path_factory.mktemp("classifier"), hidden_dropout_prob=0.1)
    return AutoModelForImageClassification.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)


@pytest.fixture
def trainer_of(classifier, tmp_path):
    model, processor = classifier

    def make(**arguments) -> Trainer:
        pixels = processor(IMAGES, return_tensors="pt")["pixel_values"]
        rows = [{"pixel_values": x, "labels": i} for i, x in enumerate(pixels)]
        settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 4, "seed": 0}
        settings |= {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
        }
        return Trainer(
            copy.deepcopy(model),
            TrainingArguments(tmp_path / "run", **(settings | arguments)),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=processor,
        )

    return make


def callback_of(trainer: Trainer) -> tve_hf.ExplanationCallback:
    callback = tve_hf.ExplanationCallback(trainer, IMAGES, method_kwargs={"n_samples": 40})
    trainer.add_callback(callback)
    return callback


def test_the_fidelity_is_that_of_the_model_as_it_is_then(trainer_of):
    trainer = trainer_of()
    callback_of(trainer)
    trainer.train()
    logged = {row["step"]: row["eval_fidelity_gap"] for row in trainer.state.log_history if "eval_fidelity_gap" in row}
    assert [*logged] == [2, 4] and logged[2] != logged[4]
    split = tve_hf.split_classifier(trainer.model.eval(), trainer.processing_class)
    pixels = trainer.processing_class(IMAGES, return_tensors="pt")["pixel_values"]
    classes = trainer.model(pixels).logits.argmax(-1)
    maps = tve_hf.methods.explain("sampled", split, pixels, classes, n_samples=40)
    assert logged[4] == pytest.approx(tve_hf.fidelity(split, pixels, maps, classes).gap.mean().item(), abs=1e-5)


def test_training_is_the_same_as_without_it(trainer_of):
    plain = trainer_of()  # which sets the seed
    plain.train()
    watched = trainer_of()
    callback_of(watched)
    watched.train()
    assert same_weights(plain.model, watched.model)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_explained_in_eval_mode_and_left_as_it_was(trainer_of, training):
    trainer = trainer_of()
    metrics: dict = {}
    callback_of(trainer).on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    again: dict = {}
    trainer.model.train(training)
    callback_of(trainer).on_evaluate(trainer.args, trainer.state, trainer.control, again)
    assert metrics == again != {}  # without dropout
    assert trainer.model.training is training


def test_the_best_model_may_be_chosen_by_it(trainer_of):
    trainer = trainer_of(
        metric_for_best_model="fidelity_gap", greater_is_better=True, save_strategy="steps", save_steps=2
    )
    callback_of(trainer)
    trainer.train()
    gaps = [row["eval_fidelity_gap"] for row in trainer.state.log_history if "eval_fidelity_gap" in row]
    assert trainer.state.best_metric == max(gaps)


def test_tensorboard_holds_a_sheet_of_maps_and_the_fidelity(trainer_of, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_of(report_to="tensorboard")
    callback_of(trainer)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    sheets = events.Images("eval/explanations")
    assert [sheet.step for sheet in sheets] == [2, 4]
    first, last = (np.asarray(Image.open(BytesIO(sheet.encoded_image_string))) for sheet in sheets)
    assert first.shape == last.shape and first.shape[0] > 3 * 200 and (first != last).any()
    gaps = [row["eval_fidelity_gap"] for row in trainer.state.log_history if "eval_fidelity_gap" in row]
    assert [event.value for event in events.Scalars("eval/fidelity_gap")] == pytest.approx(gaps)


@pytest.mark.parametrize("attribute", ["_wandb", "_trackio"])
def test_libraries_get_a_picture_of_their_own_from_the_first_process(trainer_of, attribute):
    """As transformers' callbacks of them keep the library, here one that writes down what it is given."""
    logged: list[dict] = []
    library = SimpleNamespace(log=logged.append, Image=lambda picture: ("picture", picture.size))
    trainer = trainer_of()
    tracker = TrainerCallback()
    setattr(tracker, attribute, library)
    trainer.add_callback(tracker)
    callback = callback_of(trainer)
    trainer.state.global_step = 7
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, {})
    (row,) = logged
    kind, size = row["eval/explanations"]
    assert kind == "picture" and min(size) > 400 and row["train/global_step"] == 7
    trainer.state.is_world_process_zero = False
    metrics: dict = {}
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    assert len(logged) == 1 and "eval_fidelity_gap" in metrics  # by which all of them choose the best model


def test_transformers_keeps_its_trackers_where_they_are_looked_for():
    from tve_hf.evaluation.callback import _TRACKERS  # with the Trainer

    for owner, attribute in (
        (TensorBoardCallback, "tb_writer"),
        (WandbCallback, "_wandb"),
        (TrackioCallback, "_trackio"),
    ):
        assert attribute in _TRACKERS and f"self.{attribute} =" in inspect.getsource(owner.__init__)


def test_what_is_missing_is_said_before_training(trainer_of):
    trainer = trainer_of()
    with pytest.raises(ValueError, match="no image to explain"):
        tve_hf.ExplanationCallback(trainer, [])
    trainer.processing_class = None
    with pytest.raises(ValueError, match="pass it one as processing_class="):
        tve_hf.ExplanationCallback(trainer, IMAGES)


def test_the_document_runs_as_it_stands(trainer_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets = pytest.importorskip("datasets")
    test_set = datasets.Dataset.from_dict(
        {"image": IMAGES * 2}, features=datasets.Features({"image": datasets.Image()})
    )
    trainer = trainer_of(max_steps=2)
    namespace = {"trainer": trainer, "model": trainer.model, "image_processor": trainer.processing_class}
    namespace |= {"test_set": test_set, "tve_hf": tve_hf, "pipeline": pipeline}
    text = (Path(__file__).parents[2] / "docs" / "loops.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "docs/loops.md", "exec"), namespace)
    assert namespace["gap"] == trainer.state.log_history[-2]["eval_fidelity_gap"]  # by the callback
    assert np.array_equal(Image.open("explanations.png"), namespace["sheet"])
    found = namespace["test_set"]
    for i, (expected,) in enumerate(namespace["explain"](IMAGES)):
        for row in (i, i + len(IMAGES)):
            np.testing.assert_allclose(found[row]["attribution"], expected["attribution"], atol=1e-5)
            np.testing.assert_allclose(namespace["maps"][row], expected["attribution"], atol=1e-5)
            assert found[row]["label"] == expected["label"]
