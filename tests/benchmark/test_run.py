"""The evaluation of an explainer on a parquet file of noise: its report, recomputed."""

import json
import statistics
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import GRID, HOPS, make_shapley_explainer, noise_image, save_noise, save_pair
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, pipeline

import tve_hf
from tve_hf.benchmark import judge
from tve_hf.benchmark import run as benchmark
from tve_hf.benchmark.run import EvaluateArguments, evaluate
from tve_hf.cli import main

NUM_IMAGES, METHODS = 5, ["tve", "exact", "random", "rollout"]


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    classifier, explainer = save_pair(folder)
    noise = save_noise(folder / "noise.parquet", NUM_IMAGES, label=[3, 3, 1, 0, 3])
    return {
        "classifier": str(classifier),
        "model": str(explainer),
        "test_files": [str(noise)],
        "methods": ["random", "rollout"],
        "removals": ["zero"],
        "rule": "log_prob",
        "batch_size": 3,
    }


@pytest.fixture
def report(settings, tmp_path):
    evaluate(EvaluateArguments(**settings, output_dir=str(tmp_path / "deep" / "report")))
    return json.loads((tmp_path / "deep" / "report" / "report.json").read_text())


def test_summary_is_recomputed_from_the_images(report):
    per_image = {key: np.array([float(value) for value in column]) for key, column in report["per_image"].items()}
    assert all(column.shape == (NUM_IMAGES,) for column in per_image.values())
    summary = report["summary"]
    assert report["num_images"] == NUM_IMAGES
    for name, reduce, column in (
        ("median_spearman", np.median, "spearman"),
        ("median_pearson", np.median, "pearson"),
        ("mean_kept_error", np.mean, "kept_error"),
        ("mean_removed_error", np.mean, "removed_error"),
        ("median_epsilon", np.median, "epsilon"),
        ("median_bound", np.median, "bound"),
        ("mean_error_nats", np.mean, "error"),
        ("accuracy", np.mean, "correct"),
    ):
        assert float(summary[name]) == pytest.approx(reduce(per_image[column]), abs=1e-4), name
    fidelity = summary["fidelity"]["zero"]
    assert set(fidelity) == set(METHODS)
    gaps = {}
    for method in METHODS:
        plus, minus = (per_image[f"{method}/zero/{side}"] for side in ("plus", "minus"))
        gaps[method] = plus - minus
        for name, column in (("plus_auc", plus), ("minus_auc", minus), ("gap", plus - minus)):
            expected = [column.mean(), statistics.stdev(column.tolist())]
            assert fidelity[method][name] == pytest.approx(expected, abs=2e-4)
    assert "gap_above_random" not in fidelity["random"]
    for method in set(METHODS) - {"random"}:
        low, high = fidelity[method]["gap_above_random"]
        assert low - 1e-4 <= (gaps[method] - gaps["random"]).mean() <= high + 1e-4
    share = gaps["tve"].mean() / gaps["exact"].mean()
    assert summary["tve_share_of_exact"] == {"zero": pytest.approx(share, rel=0.05, abs=1e-3)}


def test_images_are_those_of_the_pipeline(report, settings):
    explain = pipeline("transferable-attribution", model=settings["model"], classifier=settings["classifier"])
    labels = [3, 3, 1, 0, 3]
    assert sorted(report["rows"]) == list(range(NUM_IMAGES)) != report["rows"]
    for place, seed in enumerate(report["rows"]):
        (result,) = explain(noise_image(seed), rule="log_prob", verify=GRID * GRID)
        found = result["verification"]
        for name in ("pearson", "spearman", "kept_error", "removed_error", "epsilon", "error"):
            value = float(report["per_image"][name][place])
            assert value == pytest.approx(found[name], rel=1e-3, abs=2e-4), name
        assert report["per_image"]["correct"][place] == (result["class_idx"] == labels[seed])
        pixel_values = explain.image_processor(noise_image(seed), return_tensors="pt")["pixel_values"]
        scores = torch.from_numpy(result["attribution"]).view(1, -1)
        class_idx = torch.tensor([result["class_idx"]])
        curves = tve_hf.fidelity(explain.classifier, pixel_values, scores, class_idx, removal="zero")
        assert report["per_image"]["tve/zero/plus"][place] == pytest.approx(float(curves.plus_auc), abs=1e-4)
        assert report["per_image"]["tve/zero/minus"][place] == pytest.approx(float(curves.minus_auc), abs=1e-4)
    assert explain.model.config.hops == HOPS


def test_faithfulness_is_recomputed_coalition_by_coalition(report, settings):
    """Each coalition is shown by hand, and correlated with the sum of the pipeline's scores by numpy."""
    data = datasets.Dataset.from_parquet(settings["test_files"][0])
    images = [data[row]["image"] for row in report["rows"]]
    explain = pipeline("transferable-attribution", model=settings["model"], classifier=settings["classifier"])
    classifier = tve_hf.split_classifier(settings["classifier"])
    coalitions = tve_hf.coalitions.Coalitions().draw(1, 64, (GRID, GRID), torch.Generator().manual_seed(1))[0]
    for image, found in zip(images, report["per_image"]["tve/faithfulness"], strict=True):
        (result,) = explain(image, rule="log_prob")
        pixel_values = classifier.image_processor(image, return_tensors="pt")["pixel_values"]
        side = pixel_values.shape[-1] // GRID
        logits = []
        for keep in coalitions:
            shown = keep.view(GRID, GRID).repeat_interleave(side, 0).repeat_interleave(side, 1)
            with torch.no_grad():
                logits.append(classifier(pixel_values * shown).logits[0, result["class_idx"]].item())
        sums = [result["attribution"].flatten()[keep.numpy()].sum() for keep in coalitions]
        assert found == pytest.approx(np.corrcoef(sums, logits)[0, 1], abs=2e-4)
    medians = {spec: np.median(report["per_image"][f"{spec}/faithfulness"]) for spec in METHODS}
    assert report["summary"]["faithfulness"] == pytest.approx(medians, abs=1e-4)


def test_same_seed_same_report(report, settings, tmp_path):
    again = evaluate(EvaluateArguments(**settings, output_dir=str(tmp_path / "again")))
    assert json.loads((tmp_path / "again" / "report.json").read_text())["per_image"] == report["per_image"]
    assert again["summary"]["fidelity"] == report["summary"]["fidelity"]


def test_compiled_passes_change_no_result(report, settings, tmp_path, monkeypatch):
    batches = []

    def compiler(function, **_):
        def run(pixel_values):
            batches.append(len(pixel_values))
            return function(pixel_values)

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    changed = settings | {"torch_compile": True, "output_dir": str(tmp_path / "compiled")}
    compiled = evaluate(EvaluateArguments(**changed))
    assert sum(batches) > compiled["num_images"]
    for key, values in report["per_image"].items():
        expected = pytest.approx([float(value) for value in values], rel=1e-3, abs=1e-4, nan_ok=True)
        assert compiled["per_image"][key] == expected, key
    for spec, cost in report["cost"].items():
        assert {name: compiled["cost"][spec][name] for name in ("forward", "backward")} == {
            name: cost[name] for name in ("forward", "backward")
        }


def test_nothing_is_computed_twice(settings, tmp_path, monkeypatch):
    """An interrupted run, taken up with more methods, asks only for what is missing, and ends as if uninterrupted."""
    asked: list[tuple[str, int]] = []
    explain = judge.methods.explain

    def counted(name, classifier, pixel_values, *args, **options):
        if len(asked) == 3 and not (tmp_path / "part" / "report.json").exists() and name != "grad_cam":
            raise KeyboardInterrupt
        asked.append((name, len(pixel_values)))
        return explain(name, classifier, pixel_values, *args, **options)

    monkeypatch.setattr(judge.methods, "explain", counted)
    monkeypatch.setattr(benchmark, "refusal", lambda *_: None)
    part = settings | {"output_dir": str(tmp_path / "part")}
    with pytest.raises(KeyboardInterrupt):
        evaluate(EvaluateArguments(**part))
    assert asked == [("random", 3), ("rollout", 3), ("random", 2)]
    (tmp_path / "part" / "report.json").touch()  # from here on nothing interrupts
    asked.clear()
    evaluate(EvaluateArguments(**part))
    assert asked == [("rollout", 2), ("tve", 1), ("tve", 1)]  # the last on noise, for what the explainer computes
    asked.clear()
    more = evaluate(EvaluateArguments(**(part | {"methods": ["random", "rollout", "grad_cam"]})))
    assert asked == [("grad_cam", 3), ("grad_cam", 2)]
    whole = settings | {"methods": ["random", "rollout", "grad_cam"], "output_dir": str(tmp_path / "whole")}
    assert evaluate(EvaluateArguments(**whole))["per_image"] == more["per_image"]


def gaps(report, spec):
    """Fidelity of a method under zero, by row of the test files."""
    plus, minus = (report["per_image"][f"{spec}/zero/{side}"] for side in ("plus", "minus"))
    return {row: (p, m) for row, p, m in zip(report["rows"], plus, minus, strict=True)}


def test_a_batch_of_as_many_images_as_there_are_levels(settings, tmp_path):
    """Fidelity has 14 levels: in batches of 15 and 14 images, its curves are those of all images at once."""
    noise = save_noise(tmp_path / "noise.parquet", 29)
    alone = settings | {"model": None, "grid_size": GRID, "methods": ["centre"], "test_files": [str(noise)]}
    halves = evaluate(EvaluateArguments(**(alone | {"batch_size": 15}), output_dir=str(tmp_path / "halves")))
    whole = evaluate(EvaluateArguments(**(alone | {"batch_size": 29}), output_dir=str(tmp_path / "whole")))
    assert halves["curves"] == whole["curves"] and halves["per_image"] == whole["per_image"]
    assert halves["curves"]["zero/centre"]["sparsity"] == pytest.approx([i / 13 for i in range(14)], abs=1e-4)
    assert halves["cost"]["centre"]["forward"] == 0


def test_the_seed_reaches_methods_of_captum(settings, tmp_path):
    sampled = settings | {"model": None, "grid_size": GRID, "methods": ["lime@20", "centre"]}
    zero, one = (
        evaluate(EvaluateArguments(**sampled, seed=seed, output_dir=str(tmp_path / str(seed)))) for seed in (0, 1)
    )
    same, other = (
        [abs(a - b) for row in range(5) for a, b in zip(gaps(zero, spec)[row], gaps(one, spec)[row], strict=True)]
        for spec in ("centre", "lime@20")
    )
    assert max(same) < 1e-4 < max(other)


def test_other_columns_are_not_mixed_up(tmp_path, settings):
    """In one folder, one after the other: what is right by one column is not by another, and images are others."""
    classifier = tve_hf.split_classifier(settings["classifier"])
    pixel_values = classifier.image_processor([noise_image(seed) for seed in range(10)], return_tensors="pt")
    class_idx = classifier(pixel_values["pixel_values"]).logits.argmax(-1)
    columns = {
        "image": [noise_image(seed) for seed in range(5)],
        "other/image": [noise_image(seed) for seed in range(5, 10)],
        "wrong": ((class_idx[:5] + 1) % 7).tolist(),
        "right": class_idx[:5].tolist(),
        "name": [classifier.id2label[index].upper() for index in class_idx[:5].tolist()],
        "right of other": class_idx[5:].tolist(),
        "strange": ["dog"] * 5,
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "noise.parquet")
    alone = settings | {"model": None, "grid_size": GRID, "methods": ["centre"]}
    alone |= {"test_files": [str(tmp_path / "noise.parquet")], "output_dir": str(tmp_path / "report")}
    fresh = evaluate(EvaluateArguments(**(alone | {"image_column": "other/image", "output_dir": str(tmp_path / "o")})))
    runs = {
        label: evaluate(EvaluateArguments(**alone, label_column=label, image_column=image))
        for label, image in {
            "wrong": "image",
            "right": "image",
            "name": "image",
            "strange": "image",
            "right of other": "other/image",
        }.items()
    }
    accuracy = {label: report["summary"].get("accuracy") for label, report in runs.items()}
    assert accuracy == {"wrong": 0.0, "right": 1.0, "name": 1.0, "strange": None, "right of other": 1.0}
    assert gaps(runs["right of other"], "centre") == gaps(fresh, "centre") != gaps(runs["right"], "centre")


def test_labels_that_are_no_classes_leave_the_accuracy_out_with_a_warning(settings, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(benchmark.logger, "warning", warnings.append)
    noise = save_noise(tmp_path / "noise.parquet", 2, label=["dog", "cat"])
    alone = settings | {"model": None, "grid_size": GRID, "methods": ["centre"], "test_files": [str(noise)]}
    report = evaluate(EvaluateArguments(**alone, output_dir=str(tmp_path / "report")))
    assert "accuracy" not in report["summary"] and "correct" not in report["per_image"]
    (warning,) = warnings
    assert "labels in column 'label' are not the classes of" in warning and "label_column" in warning


def test_another_explainer_computes_its_own_cells_alone(settings, tmp_path, monkeypatch):
    """In the folder of the first: methods are not run again, and the new explainer says what it says elsewhere."""
    other = tve_hf.TVEExplainer.from_pretrained(settings["model"])
    with torch.no_grad():
        other.trunk.differences.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(5))
    other.save_pretrained(tmp_path / "other")
    first = evaluate(EvaluateArguments(**settings, output_dir=str(tmp_path / "both")))
    second = settings | {"model": str(tmp_path / "other")}
    fresh = evaluate(EvaluateArguments(**second, output_dir=str(tmp_path / "fresh")))
    asked, explain = [], judge.methods.explain
    monkeypatch.setattr(benchmark, "refusal", lambda *_: None)
    monkeypatch.setattr(judge.methods, "explain", lambda name, *a, **o: asked.append(name) or explain(name, *a, **o))
    report = evaluate(EvaluateArguments(**second, output_dir=str(tmp_path / "both")))
    assert asked == ["tve"] * 2  # on noise, for what the new explainer computes itself
    assert report["per_image"] == fresh["per_image"]
    assert gaps(report, "tve") != gaps(first, "tve") and gaps(report, "rollout") == gaps(first, "rollout")
    assert (
        evaluate(EvaluateArguments(**settings, output_dir=str(tmp_path / "both")))["per_image"] == first["per_image"]
    )


def test_images_come_from_every_kind_of_file(settings, tmp_path):
    """Parquet, arrow, tar and image files of the same pictures give the same numbers."""
    from_parquet = save_noise(tmp_path / "noise.parquet", 3)
    datasets.Dataset.from_parquet(str(from_parquet)).save_to_disk(tmp_path / "disk")
    with tarfile.open(tmp_path / "noise.tar", "w") as tar:
        for seed in range(3):
            noise_image(seed).save(tmp_path / f"{seed}.png")
            tar.add(tmp_path / f"{seed}.png", f"{seed}.png")
    alone = settings | {"model": None, "grid_size": GRID, "methods": ["centre"]}
    patterns = {"parquet": "noise.parquet", "arrow": "disk/*.arrow", "tar": "noise.tar", "images": "*.png"}
    runs = [
        evaluate(EvaluateArguments(**(alone | {"test_files": [str(tmp_path / p)]}), output_dir=str(tmp_path / kind)))
        for kind, p in patterns.items()
    ]
    assert len(runs[0]["per_image"]["centre/zero/plus"]) == 3
    assert all(run["per_image"] == runs[0]["per_image"] for run in runs)


def test_cost_counts_the_passes(report):
    """One pass for tve and rollout, which was tried before, none for random, two a patch for exact."""
    assert report["cost"]["tve"]["forward"] == 1
    assert report["cost"]["rollout"]["forward"] == 1
    assert report["cost"]["random"]["forward"] == 0
    assert report["cost"]["exact"]["forward"] == 2 * GRID**2
    assert all(report["cost"][name]["backward"] == 0 for name in ("tve", "exact", "random"))
    assert all(cost["seconds"] > 0 for cost in report["cost"].values())
    assert {name for name, cost in report["cost"].items() if cost["explainer"] > 0} == {"tve"}


def test_gradients_are_counted_and_no_explainer_is_needed(settings, tmp_path):
    alone = settings | {"model": None, "grid_size": GRID, "methods": ["grad_cam"], "output_dir": str(tmp_path)}
    report = evaluate(EvaluateArguments(**alone))
    cost = report["cost"]["grad_cam"]
    assert (cost["forward"], cost["backward"]) == (1, 1)
    assert set(report["summary"]["fidelity"]["zero"]) == {"grad_cam"}
    assert "median_spearman" not in report["summary"]


def test_vit_shapley_joins_at_the_cost_of_one_pass(settings, tmp_path):
    classifier = tve_hf.split_classifier(settings["classifier"])
    explainer = make_shapley_explainer(classifier)
    explainer.save_pretrained(tmp_path / "shapley")
    alone = settings | {"model": None, "methods": ["random"], "vit_shapley": str(tmp_path / "shapley")}
    report = evaluate(EvaluateArguments(**alone, output_dir=str(tmp_path / "report")))  # on the explainer's grid
    assert set(report["summary"]["fidelity"]["zero"]) == {"vit_shapley", "random"}
    assert (report["cost"]["vit_shapley"]["forward"], report["cost"]["vit_shapley"]["backward"]) == (1, 0)
    assert report["cost"]["vit_shapley"]["explainer"] > 0 == report["cost"]["random"]["explainer"]
    images = [noise_image(seed) for seed in report["rows"]]
    pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
    class_idx = classifier(pixel_values).logits.argmax(-1)
    scores = tve_hf.methods.explain(
        "vit_shapley", classifier, pixel_values, class_idx, GRID, shapley_explainer=explainer
    )
    found = tve_hf.fidelity(classifier, pixel_values, scores, class_idx)
    assert report["per_image"]["vit_shapley/zero/plus"] == pytest.approx(found.plus_auc.tolist(), abs=1e-4)

    with pytest.raises(ValueError, match=r"grid of .*shapley is \(4, 4\), not \(2, 2\)"):
        evaluate(EvaluateArguments(**(alone | {"grid_size": 2}), output_dir=str(tmp_path / "other")))
    other = tve_hf.split_classifier(settings["classifier"])
    with torch.no_grad():
        other.head.module.weight.mul_(1.1)
    other.backbone.model.save_pretrained(tmp_path / "head")
    classifier.image_processor.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="bound to the head of tiny"):
        evaluate(EvaluateArguments(**(alone | {"classifier": str(tmp_path / "head")}), output_dir=str(tmp_path / "h")))


def test_pictures_and_table(settings, tmp_path):
    arguments = settings | {"removals": ["zero", "blur"], "num_gallery": 2, "output_dir": str(tmp_path)}
    report = evaluate(EvaluateArguments(**arguments))
    for name in ("fidelity", "cost", "removals", "gallery"):
        picture = Image.open(tmp_path / f"{name}.png").convert("RGB")
        assert min(picture.size) > 100 and len(picture.getcolors(10**6)) > 10
    table = (tmp_path / "table.md").read_text()
    for removal in ("zero", "blur"):
        for method in METHODS:
            mean, _ = report["summary"]["fidelity"][removal][method]["gap"]
            assert f"{mean:.3f}" in table.split(f"Removed pixels: {removal}")[1]
    assert set(report["summary"]["rank_agreement"]) == {"zero/blur"}


def test_command_line(settings, tmp_path, capsys):
    arguments = []
    for name, value in (settings | {"num_images": 2, "output_dir": str(tmp_path)}).items():
        arguments += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    assert main(["evaluate", *arguments]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert capsys.readouterr().out.strip() == (tmp_path / "table.md").read_text().strip()
    assert report["num_images"] == 2


def test_a_budget_leaves_out_what_cannot_serve_and_says_why(settings, tmp_path):
    """None of the methods that read attention serves a CNN; asked for by name, such a one is an error at once."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "cnn")
    AutoImageProcessor.from_pretrained(settings["classifier"]).save_pretrained(tmp_path / "cnn")
    alone = settings | {"classifier": str(tmp_path / "cnn"), "model": None, "grid_size": GRID, "num_images": 1}
    budgets = alone | {"methods": ["paper", "fair"], "output_dir": str(tmp_path / "report")}
    report = evaluate(EvaluateArguments(**budgets))
    attention = {"raw_attention", "rollout", "attention_cam", "chefer_cam", "legrad", "libragrad", "text_span"}
    assert set(report["refused"]) == attention
    served = set(report["summary"]["fidelity"]["zero"])
    assert served == {spec for name in ("paper", "fair") for spec in benchmark.BUDGETS[name]} - attention
    assert {"rise@50", "rise@400", "exact", "deep_lift"} <= served
    table = (tmp_path / "report" / "table.md").read_text()
    assert all(f"- {spec}: {reason}" in table for spec, reason in report["refused"].items())
    assert report["cost"]["kernel_shap@400"]["forward"] == pytest.approx(400, abs=3)
    with pytest.raises(ValueError, match="attention"):
        evaluate(EvaluateArguments(**(alone | {"methods": ["random", "rollout"], "output_dir": str(tmp_path / "o")})))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "photo"}, "No column 'photo'.*image, label"),
        ({"num_images": 0}, "no image with num_images=0"),
        ({"methods": ["magic"]}, "Unknown method 'magic'"),
        ({"rule": "magic"}, "Unknown rule 'magic'"),
        ({"removals": ["magic"]}, "Unknown removal operator 'magic'"),
        ({"methods": ["rollout@5"]}, "rollout draws no samples"),
        ({"methods": ["tve"], "model": None, "grid_size": GRID}, "tve needs an explainer; pass model"),
        ({"methods": ["vit_shapley"]}, "vit_shapley needs an explainer of the classifier; pass vit_shapley"),
        ({"methods": ["random"], "model": None}, "pass grid_size"),
        ({"grid_size": GRID + 1}, "leave out grid_size and hops"),
    ],
)
def test_mistakes_are_named(settings, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateArguments(**(settings | changes), output_dir=str(tmp_path / "report")))
    assert not (tmp_path / "report").exists()


def test_other_settings_are_named_and_nothing_is_mixed(settings, tmp_path):
    evaluate(EvaluateArguments(**settings, output_dir=str(tmp_path), num_images=2))
    before = (tmp_path / "report.json").read_text()
    with pytest.raises(ValueError, match="rule was 'log_prob', now 'logit'.*another output_dir"):
        evaluate(EvaluateArguments(**(settings | {"rule": "logit"}), output_dir=str(tmp_path), num_images=2))
    assert (tmp_path / "report.json").read_text() == before
