"""An explainer that has learnt nothing: of the trunk and sizes that were asked for, the same for the same seed."""

import pytest
import torch
from scripts import load_example
from tiny import GRID, save_classifier

from tve_hf import TVEExplainer, methods, split_classifier


@pytest.mark.parametrize("trunk", ["backbone", "vit_mae"])
def test_it_fits_its_classifier_and_follows_from_its_seed(trunk, tmp_path):
    make = load_example("reproduce/new_explainer").main
    folder = save_classifier(tmp_path / "classifier")
    given = ["--classifier", str(folder), "--grid_size", str(GRID), "--trunk", trunk, "--hidden_size", "16"]
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        make([*given, "--num_hidden_layers", "2", "--seed", seed, "--output_dir", str(tmp_path / name)])
    one, same, other = (TVEExplainer.from_pretrained(tmp_path / name).eval() for name in ("one", "same", "other"))
    assert one.config.trunk == trunk and one.config.backgrounds == "random"
    weights, again = one.state_dict(), same.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert any(not torch.equal(weights[name], other.state_dict()[name]) for name in weights)
    classifier = split_classifier(str(folder))
    scores = methods.explain("tve", classifier, classifier.probe(), 0, explainer=one)
    assert scores.shape[1:] == (GRID, GRID) and torch.isfinite(scores).all()
