"""The study of transfer: its rows are the methods' own maps, judged by the task, and it goes on where it was."""

import json

import pytest
import torch
from tiny import GRID, make_explainer, noise_image, save_classifier, save_noise

from tve_hf import fidelity, methods, split_classifier


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Two classifiers of one backbone with heads of 7 and of 5 classes, their explainer, and images."""
    root = tmp_path_factory.mktemp("transfer")
    general = save_classifier(root / "general")
    model = split_classifier(str(general)).backbone.model
    model.classifier = torch.nn.Linear(model.classifier.in_features, 5)
    torch.nn.init.normal_(model.classifier.weight)
    model.config.id2label = {number: f"class {number}" for number in range(5)}
    model.save_pretrained(root / "task")
    split_classifier(str(general)).image_processor.save_pretrained(root / "task")
    make_explainer(split_classifier(str(general))).save_pretrained(root / "explainer")
    save_noise(root / "x.parquet", 6)
    return root


def arguments(heads, output, *more):
    given = [
        "--classifier",
        str(heads / "task"),
        "--general",
        str(heads / "general"),
        "--model",
        str(heads / "explainer"),
    ]
    return [*given, "--files", str(heads / "x.parquet"), "--grid_size", str(GRID), "--output_dir", str(output), *more]


def test_rows_are_the_maps_of_both_heads_judged_by_the_task(study, heads, tmp_path, monkeypatch):
    study.main(arguments(heads, tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    task, general = (split_classifier(str(heads / name)) for name in ("task", "general"))
    explainer = study.TVEExplainer.from_pretrained(heads / "explainer").eval()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0)).tolist()
    pixel_values = task.image_processor([noise_image(n) for n in order], return_tensors="pt")["pixel_values"]
    for spec, reading in (("tve", task), ("tve_general", general)):
        with torch.no_grad():
            own, judged = (c(pixel_values).logits.argmax(-1) for c in (reading, task))
        scores = methods.explain("tve", reading, pixel_values, own, explainer=explainer)
        for removal in ("zero", "blur"):
            curves = fidelity(task, pixel_values, scores, judged, removal=removal)
            assert report["per_image"][f"{spec}/{removal}/plus"] == pytest.approx(curves.plus_auc.tolist(), abs=1e-4)
            gap = report["summary"]["fidelity"][removal][spec]["gap"][0]
            assert gap == pytest.approx(curves.gap.mean().item(), abs=1e-4)
    monkeypatch.setattr(study, "fidelity", None)  # nothing is computed again
    study.main(arguments(heads, tmp_path))
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_another_backbone_is_refused(study, heads, tmp_path):
    other = save_classifier(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit, match="have different backbones; give heads of one"):
        study.main([*arguments(heads, tmp_path / "out"), "--general", str(other)])


def test_no_image_is_refused(study, heads, tmp_path):
    with pytest.raises(SystemExit, match="gives no image with num_images=0; pass at least one"):
        study.main(arguments(heads, tmp_path, "--num_images", "0"))
    assert not (tmp_path / "report.json").exists()
