"""The study of objectives: its plain variant is what `pretrain` does, and its other losses are what they say."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from tiny import GRID, HOPS, noise_image, same_weights, save_classifier

from tve_hf import split_classifier
from tve_hf.pretrain import PretrainArguments, pretrain

EXAMPLE = Path(__file__).parents[2] / "examples" / "study_objective.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("study_objective", EXAMPLE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    save_classifier(root / "classifier")
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [noise_image(seed) for seed in range(6)]}, features=features)
    rows.to_parquet(root / "noise.parquet")
    return root


@pytest.fixture
def args(folder, tmp_path):
    return PretrainArguments(
        str(folder / "classifier"),
        str(tmp_path / "run"),
        train_files=[str(folder / "noise.parquet")],
        grid_size=GRID,
        hops=HOPS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        patches_per_image=3,
        batch_size=2,
        max_steps=5,
        mixed_precision="no",
        seed=3,
    )


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_plain_variant_is_what_pretrain_does(example, folder, args, precision):
    args = dataclasses.replace(args, mixed_precision=precision)
    classifier = split_classifier(args.classifier, dtype=torch.float32)
    teacher = split_classifier(args.classifier, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    images = example.images_of(str(folder / "noise.parquet"), 6, classifier)
    explainers, seconds = example.train(args, classifier, teacher, images, longer=2)
    assert same_weights(explainers["eq8"], pretrain(args))
    assert set(seconds) == {"masked passes", "plain pass", "explainer"}
    plain = dict(explainers["eq8"].named_parameters())
    for name in ("balanced", "per_dimension", "huber", "kl", "logits", "same_draws", "mean_0.98"):
        assert any(not torch.equal(weight, plain[key]) for key, weight in explainers[name].named_parameters()), name


def test_the_losses_by_hand(example, folder):
    classifier = split_classifier(str(folder / "classifier"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    size = 4, 3, classifier.embedding_dim
    exact = [torch.randn(size, generator=generator), 0.1 * torch.randn(size, generator=generator)]
    start = [torch.zeros(size), torch.zeros(size)]
    predicted = [torch.randn(size, generator=generator), 0.1 * torch.randn(size, generator=generator)]
    found = example.losses(classifier, exact, start)
    squares = [(p - e).square().mean((0, 1)) for p, e in zip(predicted, exact, strict=True)]
    variances = [e.flatten(0, 1).var(0) for e in exact]
    half = (variances[0].mean() + variances[1].mean()) / 2
    plain = sum(square.sum() for square in squares)
    balanced = sum(half * (s / v.mean()).sum() for s, v in zip(squares, variances, strict=True))
    each = sum(half * (s / v).sum() for s, v in zip(squares, variances, strict=True))
    torch.testing.assert_close(found["eq8"](predicted, exact), plain)
    torch.testing.assert_close(found["balanced"](predicted, exact), balanced)
    torch.testing.assert_close(found["per_dimension"](predicted, exact), each)

    # Far within its threshold, Huber's loss is the square; far outside, it grows with the distance.
    near = [e + 1e-3 for e in exact]
    torch.testing.assert_close(found["huber"](near, exact), found["eq8"](near, exact))
    far, further = ([e + distance for e in exact] for distance in (1e3, 2e3))
    assert found["huber"](further, exact) / found["huber"](far, exact) == pytest.approx(2, abs=0.01)

    # A term of the head adds a tenth at the start, in proportion to the term elsewhere, nothing where all is exact.
    def logits(pair):
        return sum(
            (classifier.head(p) - classifier.head(e)).square().sum(-1).mean() for p, e in zip(*pair, strict=True)
        )

    def divergence(pair):
        rows = [[classifier.head(x).log_softmax(-1).flatten(0, 1) for x in both] for both in zip(*pair, strict=True)]
        return sum(torch.nn.functional.kl_div(p, e, log_target=True, reduction="batchmean") for p, e in rows)

    for name, term in {"logits": logits, "kl": divergence}.items():
        added = [found[name](*pair) - found["eq8"](*pair) for pair in ((start, exact), (predicted, exact))]
        torch.testing.assert_close(added[0], 0.1 * found["eq8"](start, exact), rtol=1e-3, atol=1e-4)
        wanted = added[0] * term((predicted, exact)) / term((start, exact))
        torch.testing.assert_close(added[1], wanted, rtol=1e-3, atol=1e-4)
        assert found[name](exact, exact) == 0


def test_means_of_weights(example, folder, args):
    classifier = split_classifier(args.classifier, dtype=torch.float32)
    student = example.Student(args, classifier, 3, example.distance, decays=(0.5,))
    inputs = example.look(classifier, classifier.probe())
    patch_idx = torch.tensor([[0, 1, 2]] * 2)
    exact = [torch.randn(2, 3, classifier.embedding_dim)] * 2
    seen = []
    for _ in range(3):
        student.learn(inputs, patch_idx, exact)
        seen.append(student.explainer.trunk.differences.weight.detach().clone())
    wanted = (seen[0] + 2 * seen[1] + 4 * seen[2]) / 7
    torch.testing.assert_close(student.means[0.5].trunk.differences.weight.detach(), wanted)


def test_report(example, folder, tmp_path, monkeypatch):
    files = str(folder / "noise.parquet")
    case = [str(folder / "classifier"), str(GRID), str(HOPS), files, files]
    sizes = {"steps": 4, "batch_size": 2, "train_images": 4, "held_out_images": 3, "longer": 2, "seeds": 2}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    output = tmp_path / "objective.json"
    command = ["study", "--case", *case, *options, f"--output_file={output}", f"--cells={tmp_path / 'cells'}"]
    monkeypatch.setattr(sys, "argv", command)
    example.main()
    table = json.loads(output.read_text())["cases"]["classifier"]
    assert table["seeds"] == 2
    for measured in ("kept_error", "removed_error", "spearman", "spearman_eq7", "gap"):
        plain, other = table["eq8"][measured]["mean"], table["balanced"][measured]
        low, high = other["above_eq8"]
        difference = sum(other["of_each_seed"]) / 2
        assert low <= difference + 1e-4 and difference - 1e-4 <= high
        assert other["mean"] == pytest.approx(plain + difference, abs=2e-4)
