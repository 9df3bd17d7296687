"""The `evaluate` modules: loaded offline from their folders, against the functions and by hand."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import tve_hf
from tve_hf import metrics
from tve_hf.classifiers import split_classifier
from tve_hf.evaluation.localization import localization
from tve_hf.evaluation.perturbation import perturbation

evaluate = pytest.importorskip("evaluate")
ROOT = Path(tve_hf.__file__).parent / "metrics"


@pytest.fixture(autouse=True, scope="module")
def isolated(tmp_path_factory):
    """Modules are copied and rows are cached in a folder of the tests; one for all, since modules stay imported."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(folder / "modules"))
        monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(folder / "cache"))
        yield


def test_all_folders_are_known() -> None:
    assert metrics.available() == ["fidelity", "perturbation", "segmentation"]
    assert [
        path.name for path in sorted(ROOT.iterdir()) if (path / f"{path.name}.py").is_file()
    ] == metrics.available()
    with pytest.raises(ValueError, match="Unknown metric 'road'; choose one of fidelity, perturbation, segmentation"):
        metrics.load("road")


@pytest.mark.parametrize("name", ["fidelity", "perturbation", "segmentation"])
def test_the_example_of_the_readme_gives_what_it_says(name) -> None:
    text = (ROOT / name / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    call = next(line for line in block.splitlines() if line.startswith("metric.compute"))
    result = eval(call, {"metric": evaluate.load(str(ROOT / name))})
    promised = re.findall(r"(\w+) ([\d.]+)", block.splitlines()[-1])
    assert len(promised) >= 2
    for key, value in promised:
        digits = len(value.partition(".")[2])
        assert round(result[key], digits) == float(value), key


def test_fidelity_gives_the_means_of_the_function(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    scores, class_idx = images(4, 4, channels=1)[:, 0], torch.tensor([0, 1, 2, 3])
    found = tve_hf.fidelity(classifier, images(4, 32), scores, class_idx, 5)
    with torch.no_grad():
        full = classifier.log_prob(classifier.embed(images(4, 32))).exp()[range(4), class_idx]
    metric = metrics.load("fidelity")
    kept, removed = full[:, None] - found.minus, full[:, None] - found.plus
    metric.add_batch(full=full[:3], kept=kept[:3], removed=removed[:3])  # rows come in batches, as tensors
    metric.add(full=full[3].item(), kept=kept[3].tolist(), removed=removed[3].tolist())
    result = metric.compute()
    for name in ("plus_auc", "minus_auc", "gap"):
        assert result[name] == pytest.approx(getattr(found, name).mean().item(), abs=1e-6)
        assert result[f"{name}_std"] == pytest.approx(getattr(found, name).std().item(), abs=1e-6)


def test_perturbation_gives_the_means_of_the_function(shared_model, images) -> None:
    model = shared_model("vit")
    with torch.no_grad():
        class_idx = model(images(5, 32)).logits.argmax(-1)
    found = perturbation(split_classifier(model), images(5, 32), images(5, 4, channels=1, seed=1)[:, 0], class_idx)
    result = metrics.load("perturbation").compute(positive=found.positive, negative=found.negative)
    assert result["positive_auc"] == pytest.approx(found.positive_auc.mean().item(), abs=1e-6)
    assert result["negative_auc"] == pytest.approx(found.negative_auc.mean().item(), abs=1e-6)
    assert result["positive_accuracy"] == pytest.approx(found.positive.mean(0).tolist())
    assert result["negative_accuracy"][0] == 1
    assert min(result["positive_accuracy"]) < 1


def test_segmentation_of_images_of_different_sizes_is_that_of_all_their_pixels(images) -> None:
    sizes = [(12, 12), (12, 12), (10, 15)]
    scores = [images(1, 4, 5, channels=1, seed=i)[0, 0] for i in range(3)]
    masks = [images(1, *size, channels=1, seed=i)[0, 0] > 0.5 for i, size in enumerate(sizes)]
    metric = metrics.load("segmentation")
    for one, mask in zip(scores, masks, strict=True):
        metric.add(prediction=one.numpy(), reference=mask.numpy().astype("uint8"))
    result = metric.compute()
    found = [localization(one[None], mask[None]) for one, mask in zip(scores, masks, strict=True)]
    for name, values in (
        ("pixel_accuracy", [one.pixel_accuracy for one in found]),
        ("pointing", [one.pointing for one in found]),
        ("mean_average_precision", [one.average_precision for one in found]),
    ):
        assert result[name] == pytest.approx(torch.cat(values).mean().item(), abs=1e-6)
    intersection, union = (sum(getattr(one, name)[0] for one in found) for name in ("intersection", "union"))
    assert result["mean_iou"] == pytest.approx((intersection / union).mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("fidelity", {"full": [1.0], "kept": [[1, 0]], "removed": [[1, 0, 0]]}, r"have \[2, 3\] points; pass as many"),
        ("fidelity", {"full": [1.0], "kept": [[1]], "removed": [[1]]}, r"have \[1\] points; .* at least 2"),
        ("perturbation", {"positive": [[1, 0], [1]], "negative": [[1, 0], [1]]}, r"have \[1, 2\] points"),
        ("segmentation", {"predictions": [[[0.5]]], "references": [[[255, 0]]]}, "holds 255; pass 1 on the object"),
        ("segmentation", {"predictions": [[[0.5, 1, 2]]], "references": [[[1, 0]]]}, "1 x 2 pixels are smaller than"),
    ],
)
def test_rows_that_do_not_fit_are_refused(name, rows, message) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.load(name).compute(**rows)


def test_without_evaluate_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"pip install tve_hf\[metrics\]"):
        metrics.load("fidelity")


def test_the_folders_are_in_the_wheel() -> None:
    """Package data, since each module is loaded from its folder and is no package."""
    import tomllib

    settings = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["tve_hf"]
    packed = {path for pattern in patterns for path in ROOT.parent.glob(pattern)}
    for name in metrics.available():
        assert {ROOT / name / f"{name}.py", ROOT / name / "README.md"} <= packed
    assert importlib.util.find_spec("tve_hf.metrics") is not None
