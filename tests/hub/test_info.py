"""Which explainer fits: what `tve-hf info` says, and what the pipeline does without `model`."""

import json
import re

import pytest
import torch
from hub_server import User
from shipped import VIT, VIT_EXPLAINER
from tiny import GRID, LABELS, noise_image, save_classifier
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from tve_hf import pipeline_tve
from tve_hf.cli import main
from tve_hf.hub.info import describe
from tve_hf.released import EXPLAINERS


@pytest.fixture(scope="module")
def others(pair, tmp_path_factory):
    """Classifiers that differ from the pair's: by all weights, by the head alone, by width, by image size."""
    folder = tmp_path_factory.mktemp("others")
    made = {"wide": save_classifier(folder / "wide", hidden_size=32)}
    large = ViTImageProcessorPil(size={"height": 64, "width": 64})
    made["large"] = save_classifier(folder / "large", image_size=64, processor=large)
    for name, prefix in (("tuned", "vit."), ("other head", "classifier.")):
        model = AutoModelForImageClassification.from_pretrained(pair[0])
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if key.startswith(prefix):
                    weight.add_(0.1 * torch.randn_like(weight))
        made[name] = folder / name
        model.save_pretrained(folder / name)
        (folder / name / "preprocessor_config.json").write_text((pair[0] / "preprocessor_config.json").read_text())
    made["twin"] = pair[0]
    return made


@pytest.mark.parametrize(
    ("name", "fit", "reason"),
    [
        ("twin", "same weights", "backbone 'classifier'"),
        ("other head", "same weights", "backbone 'classifier'"),
        ("tuned", "same architecture, other weights", "other weights than"),
        ("wide", "no", "24 dimensions, but the classifier's head reads 32"),
        ("large", "no", r"images of \(32, 32\) pixels.*\(64, 64\)"),
    ],
)
def test_verdicts(pair, others, name, fit, reason):
    (found,) = describe(str(others[name]), [str(pair[1])])["explainers"]
    assert found["fit"] == fit
    assert re.search(reason, found["reason"]), found
    if fit == "no":
        with pytest.raises(ValueError) as caught:
            pipeline("transferable-attribution", model=str(pair[1]), classifier=str(others[name]))
        assert found["reason"] in str(caught.value)
    else:
        assert pipeline("transferable-attribution", model=str(pair[1]), classifier=str(others[name]))(noise_image(0))


@pytest.mark.parametrize(
    ("word", "numbers"), [("cat", [0, 1]), ("CRANE", [4, 5]), ("car", [2, 3, 6]), (" tabby ", [0]), ("", [*range(7)])]
)
def test_classes_are_found_by_a_word(pair, capsys, word, numbers):
    assert main(["info", str(pair[0]), "--search", word]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{number:6} {LABELS[number]}" for number in numbers]
    assert main(["info", str(pair[0]), "--search", word, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"class_idx": n, "label": LABELS[n]} for n in numbers]


def test_a_word_of_no_class(pair, capsys):
    assert main(["info", str(pair[0]), "--search", "tabbi"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "'tabbi'" in err and "did you mean 'tabby'" in err


def test_what_is_said_of_a_classifier(pair, capsys):
    assert main(["info", str(pair[0]), "--explainers", str(pair[1]), str(pair[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = json.loads((pair[1] / "config.json").read_text())
    assert found["classes"] == LABELS and not found["multi_label"]
    assert found["image_size"] == [32, 32] and found["embedding_dim"] == 24 and found["grid"] == [GRID, GRID]
    assert found["head"] == ["classifier"]
    assert list(found["features"]) == config["feature_names"]
    assert [shape[0] for shape in found["features"].values()] == config["feature_dims"]
    assert found["fingerprint"] == config["backbone_fingerprint"]
    assert [one["fit"] for one in found["explainers"]] == ["same weights", "no"]
    assert found["explainers"][1]["reason"] == "is no explainer"
    assert main(["info", str(pair[0])]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("7: tabby", "32 x 32", "D = 24", "2·16", config["backbone_fingerprint"]))
    for explainer, dim in zip(EXPLAINERS, (1280, 192), strict=True):
        assert f"{explainer}: no; it predicts embeddings of {dim}" in said


def test_an_explainer_without_fingerprint_or_out_of_reach_is_unknown(pair, tmp_path):
    config = json.loads((pair[1] / "config.json").read_text()) | {"backbone_fingerprint": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"backbone_fingerprint": "abc-def"}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config | {"grid_size": 5}))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    names = [str(tmp_path / name) for name in ("", "odd", "broken", "none", "list")]
    found = describe(str(pair[0]), names)["explainers"]
    assert [one["fit"] for one in found] == ["unknown"] * 5
    assert "no fingerprint" in found[0]["reason"] and "'abc-def' is no fingerprint" in found[1]["reason"]
    assert all("cannot be read" in one["reason"] for one in found[2:])


def test_explainers_of_an_author(online, monkeypatch, pair, capsys):
    card = b"---\ntags:\n- tve_hf\n---\n"
    files = {path.name: path.read_bytes() for path in pair[1].iterdir()}
    online.add("org/tve-carded", files | {"README.md": card})
    online.add("org/hidden", files | {"README.md": card}, private=True)
    online.add("else/tve", files | {"README.md": card})
    assert main(["info", str(pair[0]), "--author", "org", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["explainers"]
    assert [(one["explainer"], one["fit"]) for one in found] == [("org/tve-carded", "same weights")]
    assert not any(request.endswith(".safetensors") for request in online.requests)
    online.users["hf_owner"] = User("someone", orgs={"org": "read"})
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    assert main(["info", str(pair[0]), "--author", "org", "--explainers", str(pair[1])]) == 0
    assert "org/hidden: same weights" in capsys.readouterr().out


def test_explainers_of_a_collection(online, pair, capsys):
    slug = "someone/explainers-650000000000000000000001"
    online.collections[slug] = [("dataset", "org/photographs"), ("model", "org/vit"), ("model", "org/tve")]
    assert main(["info", str(pair[0]), "--collection", slug, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["explainers"]
    assert [(one["explainer"], one["fit"]) for one in found] == [("org/vit", "no"), ("org/tve", "same weights")]
    assert found[0]["reason"] == "is no explainer"
    assert not any(request.endswith(".safetensors") for request in online.requests)
    assert main(["info", str(pair[0]), "--collection", slug[:-1]]) == 1
    said = capsys.readouterr().err
    assert said == (
        f"tve-hf: There is no collection {slug[:-1]!r} at {online.endpoint} that you may see; pass the end of its "
        "address, owner/title-id.\n"
    )


def test_hub_out_of_reach_is_one_sentence(online, pair, capsys):
    online.__exit__()
    assert main(["info", str(pair[0]), "--author", "org"]) == 1
    assert f"tve-hf: The connection to {online.endpoint}" in capsys.readouterr().err


def test_pipeline_without_model_takes_a_fitting_explainer(pair, others, monkeypatch, caplog):
    monkeypatch.setattr(pipeline_tve, "EXPLAINERS", (*EXPLAINERS, "none/there", str(pair[1])))
    explain = pipeline("transferable-attribution", classifier=str(pair[0]))
    assert explain.model.name_or_path == str(pair[1])
    named = pipeline("transferable-attribution", model=str(pair[1]), classifier=str(pair[0]))
    assert explain(noise_image(0))[0]["score"] == named(noise_image(0))[0]["score"]
    caplog.clear()
    tuned = pipeline("transferable-attribution", classifier=str(others["tuned"]))
    assert tuned.model.name_or_path == str(pair[1]) and "other backbone weights" in caplog.text
    shipped = pipeline("transferable-attribution", classifier=str(VIT))
    assert shipped.model.name_or_path == str(VIT_EXPLAINER)


def test_pipeline_without_a_fitting_explainer_says_what_to_do(pair, caplog):
    explain = pipeline("transferable-attribution", classifier=str(pair[0]))
    (said,) = [record.message for record in caplog.records if record.name.startswith("tve_hf")]
    train = f"tve-hf pretrain --classifier {pair[0]} --backgrounds random"
    for part in (f"No released explainer fits {pair[0]}", "200 masked passes", "an explainer takes one", train):
        assert part in said, said
    assert explain(noise_image(0), method_kwargs={"n_samples": 8})[0]["method"] == "sampled"
    with pytest.raises(ValueError, match="No released explainer fits .*192 dimensions.*tve-hf pretrain"):
        pipeline("transferable-attribution", classifier=str(pair[0]), method="tve")
