"""The benchmark of half precision: its reference row against the public functions, and its other rows against it."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from tiny import make_explainer, noise_image, save_run

import tve_hf

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "precision.py"
NUM_IMAGES = 4


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    settings = save_run(folder, NUM_IMAGES)
    classifier = tve_hf.split_classifier(settings["classifier"])
    make_explainer(classifier).save_pretrained(folder / "explainer")
    main = runpy.run_path(str(SCRIPT))["main"]
    files = ["--files", *settings["train_files"]]
    main(
        ["--classifier", settings["classifier"], "--model", str(folder / "explainer"), *files]
        + ["--dtypes", "bfloat16", "--num_images", str(NUM_IMAGES), "--output_file", str(folder / "report.json")]
    )
    return folder, classifier, json.loads((folder / "report.json").read_text())


def test_the_reference_is_what_the_public_functions_give(report):
    folder, classifier, written = report
    images = [noise_image(seed) for seed in range(NUM_IMAGES)]
    pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
    class_idx = classifier(pixel_values).logits.argmax(-1)
    explainer = tve_hf.TVEExplainer.from_pretrained(folder / "explainer")
    scores = tve_hf.methods.explain("tve", classifier, pixel_values, class_idx, explainer=explainer)
    reference = written["rows"][0]
    assert (reference["dtype"], reference["same_class"]) == ("float32", 1)
    assert reference["spearman"] == pytest.approx(1)
    for removal in ("zero", "blur"):
        gap = tve_hf.fidelity(classifier, pixel_values, scores, class_idx, removal=removal).gap.mean().item()
        assert reference[removal] == {"gap": pytest.approx(gap, abs=1e-4), "above_float32": [0, 0]}


def test_half_precision_rounds_maps_of_the_same_images_and_classes(report):
    folder, classifier, written = report
    half = written["rows"][1]
    assert half["dtype"] == "bfloat16" and half["spearman"] > 0.8
    script = runpy.run_path(str(SCRIPT))
    pixel_values = classifier.image_processor([noise_image(0)], return_tensors="pt")["pixel_values"]
    class_idx = torch.tensor([0])
    names = written["settings"]["classifier"], written["settings"]["model"]
    full, rounded = (
        script["maps"](*script["prepared"](*names, dtype), pixel_values, class_idx)[1]
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < (full - rounded).abs().max() < 0.05 * full.abs().max()


def test_eight_bits_are_for_the_blocks_of_both(report):
    """Not for the head, which is folded into the explainer's last layer, nor for that layer and what is read once."""
    folder, classifier, _ = report
    linears = runpy.run_path(str(SCRIPT))["linears_of_blocks"]
    model = classifier.backbone.model
    weights = {name.removesuffix(".weight") for name, weight in model.named_parameters() if weight.ndim == 2}
    assert linears(model) == weights - {"classifier"}
    explainer = tve_hf.TVEExplainer.from_pretrained(folder / "explainer")
    everywhere = {name for name, layer in explainer.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert everywhere - linears(explainer) == {"trunk.differences", "trunk.embedding_reader.1"}
    assert len(linears(explainer)) >= 6  # of one block: attention's four and the MLP's two
