"""Theorem 1 for random backgrounds: truth and bounds against enumeration and loops, and the command."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from formulas import formula
from scripts import EXAMPLES, load_example, words
from tiny import GRID, save_models

from tve_hf import TVEConfig, TVEExplainer, sampled_meta_attribution, split_classifier
from tve_hf.verification import prediction_errors

SETS = torch.tensor(list(itertools.product([False, True], repeat=4)))  # of 2 x 2 patches, (16, N)
PAIRS = torch.stack([SETS[:8], SETS.flip(0)[:8]], 1)  # a set and its complement


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield load_example("study_theorem_random")


@pytest.fixture(scope="module")
def cnn(shared_model):
    return split_classifier(shared_model("cnn"))


@pytest.fixture(scope="module")
def truth(cnn, images):
    """Two images, and means of G over all sets with and without a patch, removed pixels zero or the image's mean."""
    pixel_values, means = images(2, 24), []
    for image in pixel_values:
        found = []
        for kept in SETS.tolist():
            for fill in (torch.zeros(3, 1, 1), image.mean((1, 2), keepdim=True)):
                masked = fill.repeat(1, 24, 24)
                for z in (z for z in range(4) if kept[z]):
                    top, left = z // 2 * 12, z % 2 * 12
                    masked[:, top : top + 12, left : left + 12] = image[:, top : top + 12, left : left + 12]
                found.append(masked)
        with torch.no_grad():
            embeddings = cnn.embed(torch.stack(found)).unflatten(0, (16, 2)).mean(1)
        means.append([[embeddings[SETS[:, z] == side].mean(0) for z in range(4)] for side in (True, False)])
    kept, removed = (torch.stack([torch.stack(of_image[side]) for of_image in means]) for side in (0, 1))
    return pixel_values, (kept, removed)


def test_the_truth_is_that_of_enumeration_over_all_removal_operators(study, cnn, truth):
    pixel_values, (kept, removed) = truth
    config = TVEConfig(
        image_size=24,
        grid_size=2,
        embedding_dim=cnn.embedding_dim,
        backgrounds="random",
        coalitions="independent",
        label_removals=["zero", "mean"],
    )
    keep = PAIRS.repeat_interleave(2, 0).repeat(32, 1, 1).flatten(0, 1)  # each set as often with either operator
    with torch.no_grad():
        whole, first, second = study.sampled(cnn, pixel_values, keep, config)
    scale = (kept - removed).abs().max()
    for found, expected in zip(whole, (kept, removed), strict=True):
        assert (found - expected).abs().max() < 0.02 * scale  # the ridge penalty is all that is left
    for one, other in zip(first, second, strict=True):  # both saw everything
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.5, 2.0])
def test_errors_and_bounds_are_those_of_loops(study, cnn, truth, spread):
    pixel_values, true = truth
    class_idx = torch.tensor([3, 1])
    generator = torch.Generator().manual_seed(0)
    predicted = tuple(part + spread * torch.randn(part.shape, generator=generator) for part in true)
    with torch.no_grad():
        found = study.compared(cnn, pixel_values, class_idx, predicted, true)
    for b in range(2):
        y, head = int(class_idx[b]), cnn.head.module
        g_hat, h_hat, g, h = (part[b] for part in (*predicted, *true))
        p = [torch.softmax(head(part).detach().double(), -1)[:, y].numpy() for part in (g_hat, h_hat, g, h)]
        epsilon = max(np.abs(p[0] / p[2] - 1).max(), np.abs(p[3] / p[1] - 1).max())
        logs = np.log(np.concatenate([p[0] / p[2], p[1] / p[3]]))
        w = head.weight[y].detach().norm().item()
        distance = sum(((g_hat - h_hat) - (g - h))[z].norm().item() for z in range(4)) / 4
        expected = {
            "epsilon": epsilon,
            "bound": -2 * math.log(1 - epsilon) if epsilon < 1 else math.inf,
            "spread": max(logs) - min(logs),
            "prob/bound": sum(epsilon * (p[2][z] + p[1][z]) for z in range(4)) / 4,
            "logit/bound": w * distance,
        }
        for rule, prefix in (("log_prob", ""), ("prob", "prob/"), ("logit", "logit/")):
            of_map, of_truth = (formula(rule, *pair, head, y, (2, 2)) for pair in ((g_hat, h_hat), (g, h)))
            expected[f"{prefix}error"] = np.abs(of_map - of_truth).mean()
            expected[f"{prefix}squared_error"] = ((of_map - of_truth) ** 2).mean()
            expected[f"{prefix}size"] = np.abs(of_truth).mean()
        measured = {name: column[b].item() for name, column in found.items()}
        assert measured == pytest.approx(expected, rel=2e-3, abs=1e-6)
        for error, bound in (
            ("error", "bound"),
            ("error", "spread"),
            ("prob/error", "prob/bound"),
            ("logit/error", "logit/bound"),
        ):
            assert expected[error] <= expected[bound]
        assert expected["spread"] <= expected["bound"]


def test_a_common_factor_costs_epsilon_and_not_the_spread(study, cnn, truth):
    """A head whose class has the probability exp(first dimension): a wrong base is a factor of all states."""
    pixel_values, true = truth

    def head(embeddings):
        log_prob = embeddings[..., :1] - 20
        return torch.cat([log_prob, torch.log1p(-log_prob.exp())], -1)

    classifier = cnn.with_head(head)
    predicted = tuple(part + 3.0 for part in true)
    with torch.no_grad():
        found = study.compared(classifier, pixel_values, torch.tensor([0, 0]), predicted, true)
    assert found["epsilon"].tolist() == pytest.approx([math.exp(3) - 1] * 2, rel=1e-3)
    assert found["bound"].tolist() == [math.inf] * 2
    for name in ("spread", "error"):
        assert found[name].tolist() == pytest.approx([0, 0], abs=1e-4)
    assert "logit/bound" not in found  # there is no row w of the class


def test_a_prediction_that_is_the_truth_has_no_error(study, cnn, truth):
    pixel_values, true = truth
    with torch.no_grad():
        found = study.compared(cnn, pixel_values, torch.tensor([0, 4]), true, true)
    sizes = {name for name in found if name.endswith("size")}
    assert len(sizes) == 3 and all((found[name] > 0).all() for name in sizes)
    assert {value for name in found.keys() - sizes for value in found[name].tolist()} == {0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("theorem"), 14)


def arguments(folder, output, *more, model="random"):
    given = {"--classifier": folder / "classifier", "--model": folder / model, "--files": folder / "noise.parquet"}
    return words(given | {"--num_images": 12, "--num_samples": 40, "--output_dir": output}, *more)


def test_the_command_measures_counts_draws_and_goes_on(study, folder, tmp_path, monkeypatch):
    whole = study.sampled
    monkeypatch.setattr(study, "sampled", stopped := Stopping(whole))
    with pytest.raises(KeyboardInterrupt):
        study.main(arguments(folder, tmp_path))
    assert stopped.calls == 2 and not (tmp_path / "report.json").exists()
    study.main(arguments(folder, tmp_path))
    assert stopped.calls == 3  # the first batch was kept
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "theorem.png").read_bytes().startswith(b"\x89PNG")

    classifier = split_classifier(str(folder / "classifier"))
    explainer = TVEExplainer.from_pretrained(folder / "random").eval()
    import datasets

    data = datasets.Dataset.from_parquet(str(folder / "noise.parquet"), cache_dir=str(tmp_path / "cache"))
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0)).tolist()[:12]
    decoded = [data[row]["image"] for row in order]
    pixel_values = classifier.image_processor(decoded, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = classifier.reading(tuple(explainer.config.feature_names))(pixel_values)
        out = explainer(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
        true = tuple(sampled_meta_attribution(classifier, pixel_values, GRID, 40, explainer.config.distribution))
        expected = prediction_errors(classifier, pixel_values, seen.logits.argmax(-1), (out.kept, out.removed), true)
    for name in ("epsilon", "error"):
        assert report["per_image"][name] == pytest.approx(expected[name].tolist(), rel=1e-3, abs=1e-5)
    assert report["num_images"] == report["summary"]["images"] == 12
    assert report["summary"]["with_bound"] == int((expected["epsilon"] < 1).sum())
    assert min(report["per_image"]["halves/error"]) > 0
    columns = {name: np.array(report["per_image"][name]) for name in ("squared_error", "halves/squared_error")}
    share = columns["halves/squared_error"].sum() / 4 / columns["squared_error"].sum()
    assert report["summary"]["sampling_share"]["log_prob"] == pytest.approx(share, abs=1e-3)


class Stopping:
    """Calls something, but is stopped the second time."""

    def __init__(self, call):
        self.call, self.calls = call, 0

    def __call__(self, *given):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return self.call(*given)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("antithetical", [], "is an explainer of two backgrounds.*examples/study_theorem.py"),
        ("random", ["--num_samples", "42"], "--num_samples is 42; give a multiple of 4 for this explainer"),
        ("random", ["--num_samples", "0"], "--num_samples is 0; give a multiple of 4"),
        ("random", ["--num_images", "0"], "gives no image with num_images=0; pass at least one"),
        ("random", ["--files", "nowhere.parquet"], "nowhere.parquet was not found"),
        ("classifier", [], "classifier"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(study, folder, tmp_path, model, more, message):
    with pytest.raises(SystemExit, match=message):
        study.main(arguments(folder, tmp_path / "out", *more, model=model))
    assert not (tmp_path / "out").exists()


def test_results_of_other_settings_are_not_mixed(study, folder, tmp_path):
    given = [*arguments(folder, tmp_path), "--num_images", "2"]
    study.main(given)
    before = (tmp_path / "report.json").read_text()
    with pytest.raises(SystemExit, match="num_samples was 40, now 44.*choose another output_dir"):
        study.main([*given, "--num_samples", "44"])
    assert (tmp_path / "report.json").read_text() == before
