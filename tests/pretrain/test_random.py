"""Pre-training on random backgrounds: its loss by hand, kept labels, resuming, and explainers made over to it."""

import json

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from interruptions import before_step
from PIL import Image
from safetensors.torch import load_file
from tiny import GRID, SIDE, noise_image, same_weights, save_run
from transformers import AutoImageProcessor, AutoModel, ViTForImageClassification, pipeline

import tve_hf
from tve_hf import fidelity, methods, split_classifier
from tve_hf.coalitions import Coalitions
from tve_hf.pretrain import PretrainArguments, pretrain

NUM_IMAGES = 8
pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture
def settings(tmp_path):
    random = {"backgrounds": "random", "coalitions_per_image": 4, "output_dir": str(tmp_path / "run")}
    return save_run(tmp_path, NUM_IMAGES) | random


def train(settings, **changes):
    AcceleratorState._reset_state(True)
    return pretrain(PretrainArguments(**(settings | changes)))


def log_of(folder):
    return json.loads((folder / "training.json").read_text())["log"]


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_first_loss_by_hand(settings, tmp_path, normalized, cached):
    """An untrained explainer predicts the point between G(empty image) and G(x) for every coalition."""
    options = {"batch_size": NUM_IMAGES, "num_epochs": 1, "flip": False, "seed": 3}
    train(settings, **options, normalize_labels=normalized, cache_labels=cached, save_steps=1)
    (row,) = log_of(tmp_path / "run")

    model = ViTForImageClassification.from_pretrained(settings["classifier"])
    processor = AutoImageProcessor.from_pretrained(settings["classifier"])
    pixel_values = processor([noise_image(seed) for seed in range(NUM_IMAGES)], return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def embed(images):
        return model.vit(images).last_hidden_state[:, 0]

    def drawn(seed, images):
        return Coalitions().draw(images, 4, (GRID, GRID), torch.Generator().manual_seed(seed))

    def embedded(masks, images):
        pixels = masks.view(-1, 4, GRID, GRID).repeat_interleave(SIDE // GRID, 2).repeat_interleave(SIDE // GRID, 3)
        return torch.stack([embed(image * mask.unsqueeze(1)) for image, mask in zip(images, pixels, strict=True)])

    step = drawn(3 * 1, NUM_IMAGES)  # of the only step
    if cached:
        masks = torch.cat([drawn(3 * NUM_IMAGES + number, 1) for number in range(NUM_IMAGES)])
        labels = embedded(masks, pixel_values)
    else:  # the masks of a step are in the order of its images
        order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(3))
        pixel_values = pixel_values[order]
        labels = embedded(step, pixel_values)
    between = (embed(pixel_values) + embed(torch.zeros(1, 3, SIDE, SIDE))) / 2
    squares = (labels - between[:, None]).square().double().numpy()
    weights = np.ones(squares.shape[-1])
    if normalized:  # by the variance within an image, of images drawn by the seed
        chosen = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(3)).flip(0).tolist()
        measured = processor([noise_image(number) for number in chosen], return_tensors="pt")["pixel_values"]
        variances = embedded(step, measured).double().numpy().var(1, ddof=1).mean(0)
        weights = 1 / np.maximum(variances, variances.mean() / 100) / len(variances)
    assert row["loss"] == pytest.approx((squares * weights).sum(-1).mean(), rel=2e-3 if cached else 1e-4)


@pytest.mark.parametrize("coalitions", ["smooth", "independent", "uniform", "shapley"])
def test_every_distribution_leaves_an_explainer_that_explains(settings, tmp_path, coalitions):
    settings |= {"validation_files": settings["train_files"], "validation_images": 2}
    # Kept labels, so that the same coalitions are compared at the beginning and at the end.
    train(
        settings, coalitions=coalitions, label_removals=["zero", "mean"], cache_labels=True, num_epochs=6, save_steps=4
    )
    log = log_of(tmp_path / "run")
    assert {"loss", "embedding_r2", "logit_r2", "fidelity_gap", "sampled_fidelity_gap"} <= set(log[0])
    assert log[-1]["loss"] < log[0]["loss"]
    saved = AutoModel.from_pretrained(tmp_path / "run")
    assert (saved.config.backgrounds, saved.config.coalitions) == ("random", coalitions)
    assert saved.config.label_removals == ["zero", "mean"]
    explain = pipeline("transferable-attribution", model=str(tmp_path / "run"), classifier=settings["classifier"])
    assert np.isfinite(explain(noise_image(0))[0]["attribution"]).all()


@pytest.mark.parametrize(("best", "choice"), [(0, "independent"), (1, "smooth")])
def test_refinement_is_fitted_to_the_most_faithful_maps(settings, tmp_path, monkeypatch, best, choice):
    """Two distributions: the one after whose maps the held-out images' gap is the widest."""
    settings |= {"validation_files": settings["train_files"], "validation_images": 2, "max_steps": 2}
    maps = []

    def gap(watch, scores):
        maps.append(scores)
        return float(len(maps) - calls_before == best + 1)

    calls_before = 5  # sampled maps, predicted ones of the only row of the log, two rules, and the sampled maps again
    monkeypatch.setattr(tve_hf.pretrain.held_out.HeldOut, "_gap", gap)
    config = train(settings).config
    assert len(maps) == calls_before + 2
    assert config.refine_coalitions == choice
    assert AutoModel.from_pretrained(tmp_path / "run").config.refine_coalitions == choice


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_is_that_of_the_most_faithful_maps(settings, tmp_path, monkeypatch, seed):
    """And what the explainer says of its quality is measured under it, and its last picture drawn."""
    colors = {None: (0, 0, 255), "prob": (255, 0, 0), "prob_averaged": (0, 255, 0)}
    monkeypatch.setattr(
        tve_hf.pretrain.held_out_coalitions.HeldOutCoalitions,
        "_picture",
        lambda watch, scores: Image.new("RGB", (1, 1), colors[watch.config.rule]),
    )
    settings |= {
        "validation_files": settings["train_files"],
        "validation_images": NUM_IMAGES,
        "max_steps": 2,
        "seed": seed,
    }
    explainer = train(settings, mixed_precision="no")
    config = AutoModel.from_pretrained(tmp_path / "run").config
    classifier = split_classifier(settings["classifier"])
    pixel_values = classifier.image_processor(
        [noise_image(number) for number in range(NUM_IMAGES)], return_tensors="pt"
    )
    class_idx = classifier(**pixel_values).logits.argmax(-1)
    gaps = {}
    for rule in ("prob", "prob_averaged"):
        scores = methods.explain(
            "tve", classifier, **pixel_values, class_idx=class_idx, explainer=explainer, rule=rule
        )
        gaps[rule] = fidelity(classifier, **pixel_values, scores=scores, class_idx=class_idx).gap.mean()
    assert gaps["prob"] != gaps["prob_averaged"]
    assert config.rule == max(gaps, key=gaps.get)
    drawn = Image.open(tmp_path / "run" / "validation-2.png").getpixel((0, 0))
    assert drawn in {colors[config.rule], colors[None] if config.rule == "prob" else None}  # prob is the default
    assert config.quality["fidelity_gap"] == pytest.approx(
        gaps[config.rule].item(), abs=2e-3
    )  # saved in half precision
    assert log_of(tmp_path / "run")[-1]["fidelity_gap"] == config.quality["fidelity_gap"]


@pytest.mark.parametrize(("cached", "killed_in_step"), [(True, 3), (True, 6), (False, 4)])
def test_resumed_run_equals_an_uninterrupted_one(settings, tmp_path, monkeypatch, cached, killed_in_step):
    settings |= {"cache_labels": cached, "normalize_labels": True, "label_removals": ["zero", "blur"]}
    whole = train(settings)
    settings["output_dir"] = str(tmp_path / "killed")

    def kill():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tve_hf.pretrain.loop, "take_step", before_step(killed_in_step, kill))
        train(settings)
    assert (tmp_path / "killed" / "labels.f16").exists() == cached
    torch.manual_seed(99)
    assert same_weights(whole, train(settings))


def test_kept_labels_are_not_computed_again(settings, monkeypatch):
    seen = []
    embed = tve_hf.pretrain.labels.embed_coalitions

    def count(classifier, pixel_values, *others):
        seen.extend([1] * len(pixel_values))
        return embed(classifier, pixel_values, *others)

    monkeypatch.setattr(tve_hf.pretrain.labels, "embed_coalitions", count)
    train(settings, cache_labels=True, num_epochs=3)
    assert len(seen) == NUM_IMAGES


def test_a_cache_of_another_distribution_is_refused(settings, tmp_path, monkeypatch):
    settings["cache_labels"] = True
    settings["num_epochs"] = 2
    finish = tve_hf.pretrain.loop.finish
    monkeypatch.setattr(tve_hf.pretrain.loop, "finish", lambda run: None)  # so that cache and checkpoint stay
    train(settings)
    with pytest.raises(ValueError, match="coalitions was 'smooth' and is 'uniform'.*Pass the old ones"):
        train(settings, coalitions="uniform")
    # A checkpoint that says nothing of it: then the masks beside the labels do.
    for progress in (tmp_path / "run").glob("checkpoint-*/progress.json"):
        told = json.loads(progress.read_text()) | {"settings": {}, "step": 2}
        progress.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="labels.f16 holds labels of other coalitions.*; remove it, or go on"):
        train(settings, coalitions="uniform")
    monkeypatch.setattr(tve_hf.pretrain.loop, "finish", finish)
    assert train(settings) is not None


@pytest.mark.slow
def test_two_processes_give_what_one_does(settings, tmp_path):
    settings |= {"num_epochs": 3, "save_steps": 3, "cache_labels": True}
    settings.pop("output_dir")
    whole = train(settings, batch_size=4, output_dir=str(tmp_path / "whole"))
    AcceleratorState._reset_state(True)
    arguments = PretrainArguments(**(settings | {"batch_size": 2}), output_dir=str(tmp_path / "two"))
    debug_launcher(lambda: pretrain(arguments), num_processes=2)
    weights = load_file(tmp_path / "two" / "checkpoint-6" / "model.safetensors")
    for name, weight in whole.state_dict().items():
        assert torch.allclose(weights[name], weight, rtol=1e-3, atol=1e-4), name


def test_an_antithetical_explainer_is_made_over(settings, tmp_path):
    before = train(settings, backgrounds="antithetical", output_dir=str(tmp_path / "before"))
    settings |= {"explainer": str(tmp_path / "before"), "max_steps": 1, "learning_rate": 0.0}
    after = train(settings, hidden_size=16)
    assert after.config.backgrounds == "random" and before.config.backgrounds == "antithetical"
    assert after.config.coalition_scale == pytest.approx(GRID / 10)  # named, not left to what a later version takes
    weights = after.state_dict()
    heads = [name for name in weights if name.startswith(("trunk.differences.", "trunk.means."))]
    assert len(heads) == 3 and not any(weights[name].any() for name in heads)  # with another meaning
    for name, weight in before.state_dict().items():
        if not name.startswith("trunk.differences."):
            assert torch.allclose(weights[name], weight, atol=1e-3), name


def test_a_random_one_goes_on_with_its_own_distribution(settings, tmp_path):
    own = {"coalitions": "independent", "coalition_prob": 0.3, "label_removals": ["blur"]}
    before = train(settings, **own, output_dir=str(tmp_path / "before"))
    settings |= {"explainer": str(tmp_path / "before"), "max_steps": 1, "learning_rate": 0.0}
    settings.pop("backgrounds")
    after = train(settings)
    assert (after.config.coalitions, after.config.coalition_prob) == ("independent", 0.3)
    assert after.config.label_removals == ["blur"]
    for name, weight in before.state_dict().items():
        assert torch.allclose(after.state_dict()[name], weight, atol=1e-3), name


def test_streamed_images(settings):
    assert torch.isfinite(torch.tensor(train(settings, streaming=True, max_steps=3).trunk.differences.weight)).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"coalitions_per_image": 3},
            "coalitions_per_image is 3, but coalitions come in pairs; choose an even number",
        ),
        ({"coalitions_per_image": 0}, "coalitions_per_image is 0, but coalitions come in pairs"),
        ({"backgrounds": "mixed"}, "Unknown backgrounds 'mixed'; choose antithetical or random"),
        ({"coalitions": "rough"}, "Unknown distribution of coalitions 'rough'; choose one of smooth"),
        ({"coalitions": "independent", "coalition_prob": 1.0}, "coalition_prob is 1.0.*choose one between 0 and 1"),
        ({"coalition_scale": 0.0}, "coalition_scale is 0.0.*choose one above 0 and below 4"),
        ({"coalition_scale": 4.0}, "coalition_scale is 4.0.*does not fit a grid of 4 x 4"),
        ({"label_removals": ["noise"]}, "Unknown removal operator 'noise' in label_removals; choose among zero"),
        ({"label_removals": []}, "label_removals names 0 operators.*name at least one"),
        ({"label_removals": ["zero", "mean", "blur"]}, "names 3 operators.*pass coalitions_per_image=6 or more"),
        ({"backgrounds": "antithetical", "label_removals": ["blur"]}, "label_removals are .* leave it out"),
    ],
)
def test_mistakes_are_named(settings, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        train(settings, **changed)
    assert not list(tmp_path.glob("run/*"))
