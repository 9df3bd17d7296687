"""Which classifier an explainer's folder leads to, and which devices there are."""

import json

import pytest
from tiny import noise_image, save_pair

from tve_hf.cli import main
from tve_hf.cli.models import classifier_of
from tve_hf.released import DEFAULT_EXPLAINER


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A classifier and its explainer, whose training.json names it as it was typed, from the current folder."""
    save_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    noise_image(0).save("photo.png")

    def named(classifier):
        (tmp_path / "explainer" / "training.json").write_text(json.dumps({"arguments": {"classifier": classifier}}))

    return named


def test_an_explainer_knows_its_classifier(trained, capsys):
    trained("classifier")
    assert main(["explain", "photo.png", "--model", "explainer"]) == 0
    alone = json.loads(open("explanations/photo.tve.json").read())
    assert main(["explain", "photo.png", "--model", "explainer", "--classifier", "./classifier"]) == 0
    assert json.loads(open("explanations/photo.tve.json").read()) == alone


@pytest.mark.parametrize(
    ("classifier", "said"),
    [
        ("gone/to/nowhere", "explainer was pre-trained for the classifier gone/to/nowhere, which is not here"),
        ("./gone", "the classifier ./gone, which is not here; say by --classifier"),
        (None, "explainer does not say which classifier it was pre-trained for; name it by --classifier."),
    ],
)
def test_a_classifier_that_is_not_there(trained, capsys, classifier, said):
    if classifier:
        trained(classifier)
    assert main(["explain", "photo.png", "--model", "explainer"]) == 1
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_a_classifier_that_lies_beside_its_explainer_now(trained, tmp_path):
    trained("elsewhere/classifier")
    assert classifier_of("explainer") == str((tmp_path / "classifier").resolve())


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"arguments": {"classifier": 3}}'])
def test_a_log_that_says_nothing(trained, content, tmp_path):
    (tmp_path / "explainer" / "training.json").write_text(content)
    with pytest.raises(ValueError, match="does not say which classifier"):
        classifier_of("explainer")


def test_names_of_the_hub_and_the_default_explainer(trained):
    trained("google/vit-base-patch16-224")
    assert classifier_of("explainer") == "google/vit-base-patch16-224"
    assert classifier_of(str(DEFAULT_EXPLAINER)) is None
