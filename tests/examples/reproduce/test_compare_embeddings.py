"""How far tuning moved a backbone: closed forms of both numbers, and those of a classifier beside another."""

import json

import pytest
import torch
from scripts import load_example
from tiny import noise_image, save_classifier, save_noise

from tve_hf import split_classifier


@pytest.fixture(scope="module")
def study():
    return load_example("reproduce/compare_embeddings")


def test_axes_of_equal_variance_are_counted(study):
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    assert study.directions(torch.cat([corners, torch.zeros(8, 2)], 1) + 5) == pytest.approx(3)
    assert study.directions(corners * torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1)
    # Variances 4 and 1: (4 + 1)² / (16 + 1).
    assert study.directions(corners[:, :2] * torch.tensor([2.0, 1.0])) == pytest.approx(25 / 17)


def test_likeness_is_that_of_gram_matrices_and_blind_to_rotation_and_scale(study):
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    other = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    centre = torch.eye(12, dtype=torch.float64) - 1 / 12
    grams = [centre @ x @ x.T @ centre for x in (one, other)]
    expected = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    assert study.likeness(one, other) == pytest.approx(expected.item())
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    assert study.likeness(one, 3 * one @ rotation + 1) == pytest.approx(1)


def test_both_classifiers_see_the_images_that_the_seed_draws(study, tmp_path):
    before, after = (save_classifier(tmp_path / name) for name in ("before", "after"))
    model = split_classifier(str(before)).backbone.model
    with torch.no_grad():
        for weight in model.base_model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(after)
    save_noise(tmp_path / "x.parquet", 25)  # a batch and a quarter
    given = ["--before", str(before), "--after", str(after), "--files", str(tmp_path / "x.parquet")]
    study.main([*given, "--num_images", "22", "--output_file", str(tmp_path / "new" / "found.json")])
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0)).tolist()[:22]
    embeddings = []
    for folder in (before, after):
        classifier = split_classifier(str(folder))
        images = [noise_image(number) for number in order]
        with torch.no_grad():
            embeddings.append(
                classifier.embed(classifier.image_processor(images, return_tensors="pt")["pixel_values"])
            )
    for when, seen in zip(("before", "after"), embeddings, strict=True):
        variances = torch.linalg.eigvalsh(torch.cov(seen.T.double()))
        expected = variances.sum() ** 2 / (variances**2).sum()
        assert found["directions"][when] == pytest.approx(expected.item(), rel=1e-3)
    assert found["likeness"] == pytest.approx(study.likeness(*(seen.double() for seen in embeddings)), rel=1e-3)
    assert 0 < found["likeness"] < 1 - 1e-6  # the weights are others

    for number, reason in (("0", "at least one"), ("1", "gives one image")):
        with pytest.raises(SystemExit, match=reason):
            study.main([*given, "--num_images", number, "--output_file", str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()
