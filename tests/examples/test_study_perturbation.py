"""The study of perturbation: its areas are those of patches deleted one by one, and it goes on where it was."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from tiny import GRID, SIDE, make_explainer, noise_image, save_classifier

from tve_hf import methods, split_classifier
from tve_hf.evaluation.statistics import bootstrap_interval

NAMES = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu"]
NUMBER = 6


def write(path, labels, feature):
    rows = {"image": [noise_image(n) for n in range(NUMBER)], "label": labels}
    features = Features({"image": Image(), "label": feature})
    Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A classifier, its explainer, and images of whose labels, in another order of the names, half are predicted."""
    root = tmp_path_factory.mktemp("perturbation")
    save_classifier(root / "classifier", id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    classifier = split_classifier(str(root / "classifier"))
    make_explainer(classifier).save_pretrained(root / "explainer")
    images = [noise_image(n) for n in range(NUMBER)]
    with torch.no_grad():
        logits = classifier(classifier.image_processor(images, return_tensors="pt")["pixel_values"]).logits
    best = logits.argsort(descending=True)
    classes = [best[n, n % 2].item() for n in range(NUMBER)]
    backwards = NAMES[::-1]
    labels = [backwards.index(NAMES[index]) for index in classes]
    write(root / "numbers.parquet", labels, ClassLabel(names=backwards))
    write(root / "names.parquet", [NAMES[index].upper() for index in classes], Value("string"))
    write(root / "others.parquet", [n % 2 for n in range(NUMBER)], ClassLabel(names=["tea", "coffee"]))
    torch.save(torch.tensor(classes), root / "classes.pt")
    return root


def arguments(inputs, output, *more, files="numbers"):
    given = ["--classifier", inputs / "classifier", "--files", inputs / f"{files}.parquet", "--output_dir", output]
    return [*map(str, given), "--methods", "legrad", "grad_cam", "random", *more]


def go(study, inputs, output, *more, **options):
    study.main(arguments(inputs, output, *more, **options))
    return json.loads((output / "report.json").read_text())


def brute_force(classifier, pixels, scores, true, ascending):
    """Area under 0 or 1 at each share of one image: the patches deleted one after another, in Python."""
    order = sorted(range(GRID**2), key=lambda n: (scores[n] if ascending else -scores[n], n))
    right = []
    for level in range(10):
        masked = pixels.clone()
        for patch in order[: round(0.1 * level * GRID**2)]:
            row, column = divmod(patch, GRID)
            side = SIDE // GRID
            masked[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = 0
        with torch.no_grad():
            right.append(classifier(masked[None]).logits.argmax().item() == true)
    return sum(0.1 * (one + other) / 2 for one, other in zip(right, right[1:], strict=False))


def test_areas_are_those_of_patches_deleted_one_by_one(study, inputs, tmp_path):
    report = go(study, inputs, tmp_path, "--layers", "1")
    classifier = split_classifier(str(inputs / "classifier"))
    order = torch.randperm(NUMBER, generator=torch.Generator().manual_seed(0))
    true = torch.load(inputs / "classes.pt")[order]
    images = [noise_image(n) for n in order.tolist()]
    pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        predicted = classifier(pixel_values).logits.argmax(-1)
    assert report["accuracy"] == 0.5 and (predicted == true).sum() == 3
    found = report["per_image"]
    for row, method, options in (("grad_cam", "grad_cam", {}), ("legrad, last 1", "legrad", {"layers": [-1]})):
        for explained, class_idx in (("predicted", predicted), ("true", true)):
            scores = methods.explain(method, classifier, pixel_values, class_idx, GRID, **options).flatten(1).tolist()
            for side, ascending in (("negative", True), ("positive", False)):
                expected = [
                    brute_force(classifier, pixels, each, label, ascending)
                    for pixels, each, label in zip(pixel_values, scores, true.tolist(), strict=True)
                ]
                assert found[f"{row}/{explained}/{side}"] == pytest.approx(expected, abs=1e-4)
    assert found["legrad, last 1/predicted/positive"] != found["legrad, last 1/true/positive"]
    assert found["legrad/true/positive"] != found["legrad, last 1/true/positive"]


def test_intervals_are_paired(study, inputs, tmp_path):
    report = go(study, inputs, tmp_path)
    found = report["per_image"]
    for explained, rows in report["summary"].items():
        for row, orders in rows.items():
            for order, entry in orders.items():
                values, reference = (
                    torch.tensor(found[f"{name}/{explained}/{order}"], dtype=torch.float64) for name in (row, "legrad")
                )
                assert entry["mean"] == pytest.approx(values.mean().item(), abs=2e-4)
                assert entry["interval"] == pytest.approx(bootstrap_interval(values), abs=2e-4)
                if row == "legrad":
                    assert "above" not in entry
                else:
                    assert entry["above"] == pytest.approx((values - reference).mean().item(), abs=2e-4)
                    assert entry["above_interval"] == pytest.approx(bootstrap_interval(values - reference), abs=2e-4)


def test_labels_may_be_names(study, inputs, tmp_path):
    one, other = (go(study, inputs, tmp_path / name, files=name) for name in ("numbers", "names"))
    assert one["per_image"] == other["per_image"]


def test_a_study_that_was_stopped_goes_on_to_the_same_numbers(study, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "BATCH", 2)
    whole = go(study, inputs, tmp_path / "whole")
    calls, perturbation = [], study.perturbation

    def stopped(*given):
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return perturbation(*given)

    monkeypatch.setattr(study, "perturbation", stopped)
    with pytest.raises(KeyboardInterrupt):
        go(study, inputs, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "report.json").exists()
    resumed = go(study, inputs, tmp_path / "stopped")
    assert {key: value for key, value in resumed.items() if key != "settings"} == {
        key: value for key, value in whole.items() if key != "settings"
    }
    monkeypatch.setattr(study, "perturbation", None)  # nothing is computed again
    assert go(study, inputs, tmp_path / "stopped") == resumed


def test_an_explainer_has_a_row_on_its_own_grid(study, inputs, tmp_path):
    report = go(study, inputs, tmp_path, "tve", "--model", str(inputs / "explainer"), "--reference", "tve")
    assert "above" not in report["summary"]["true"]["tve"]["positive"]
    assert "above" in report["summary"]["true"]["legrad"]["positive"]


@pytest.mark.parametrize(
    "more, files, message",
    [
        (["tve"], "numbers", "The method tve needs an explainer of the classifier; pass --model."),
        (["vit_shapley"], "numbers", "vit_shapley needs an explainer of the classifier; pass --vit_shapley."),
        (["grad_cat"], "numbers", "Unknown method 'grad_cat'; choose one of"),
        (
            ["--reference", "ig"],
            "numbers",
            "The reference 'ig' is none of the rows; .* among legrad; grad_cam;",
        ),
        (["--layers", "3"], "numbers", r"layers=\[-3, -2, -1\] must name some of the 2 blocks"),
        (["--label_column", "kind"], "numbers", "has no column 'kind'; pass that of labels as --label_column"),
        (["--num_images", "0"], "numbers", "gives no image with num_images=0; pass at least one"),
        (["--grid_size", "2"], "numbers", "A grid of 2 x 2 patches is too coarse for 10 shares"),
        ([], "others", "The labels are not all classes of .*; pass as --label_column one"),
        ([], "none", "none.parquet"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(study, inputs, tmp_path, more, files, message):
    with pytest.raises(SystemExit, match=message):
        go(study, inputs, tmp_path / "out", *more, files=files)
    assert not (tmp_path / "out").exists()


def test_results_of_other_settings_are_refused(study, inputs, tmp_path):
    before = go(study, inputs, tmp_path)
    with pytest.raises(SystemExit, match="other settings .seed was 0, now 1.; choose another output_dir"):
        go(study, inputs, tmp_path, "--seed", "1")
    assert json.loads((tmp_path / "report.json").read_text()) == before
