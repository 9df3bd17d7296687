"""A saved explainer with its code, used where this package is not installed, and where it is."""

import json

import numpy as np
import pytest
from stranger import explain_elsewhere
from tiny import noise_image, save_pair
from transformers import pipeline

from tve_hf.remote_code import add_remote_code, code_files


@pytest.fixture
def pair(tmp_path):
    classifier, explainer = save_pair(tmp_path)
    noise_image(0).save(tmp_path / "noise.png")
    return classifier, explainer, tmp_path / "noise.png"


def test_works_without_the_package(site, pair, tmp_path):
    classifier, explainer, image = pair
    ours = pipeline("transferable-attribution", model=str(explainer), classifier=str(classifier))(str(image))
    add_remote_code(explainer)
    found = explain_elsewhere(site, explainer, classifier, image, tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["module"].startswith("transformers_modules.")
    assert np.allclose(result["attribution"], ours[0]["attribution"], atol=1e-5)


def test_runs_nothing_unless_trusted(site, pair, tmp_path):
    add_remote_code(pair[1])
    (pair[1] / "pipeline_tve.py").write_text("open('ran', 'w')\n")
    found = explain_elsewhere(site, pair[1], pair[0], pair[2], tmp_path, trust=False)
    assert found.returncode != 0 and "trust_remote_code" in found.stderr
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "modules").rglob("*tve*"))


@pytest.mark.parametrize("trust", [None, True, False])
def test_with_the_package_its_own_classes_are_used(pair, trust, tmp_path, monkeypatch):
    classifier, explainer, image = pair
    add_remote_code(explainer)
    for file in explainer.glob("*.py"):
        file.write_text("raise SystemExit('remote code ran')\n")
    explain = pipeline(
        "transferable-attribution", model=str(explainer), classifier=str(classifier), trust_remote_code=trust
    )
    assert (
        type(explain).__module__ == "tve_hf.pipeline_tve" and type(explain.model).__module__ == "tve_hf.modeling_tve"
    )
    assert explain(str(image))
    explain.save_pretrained(tmp_path / "again")
    assert "custom_pipelines" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_code_is_the_packages_and_complete(pair):
    copies = add_remote_code(pair[1])
    assert [path.read_text() for path in copies] == [path.read_text() for path in code_files()]
    names = {path.name for path in copies}
    assert {"pipeline_tve.py", "modeling_tve.py", "configuration_tve.py", "patches.py", "classifiers.py"} <= names
    assert not names & {"cli.py", "benchmark.py", "pretrain.py", "__init__.py"}


def test_only_an_explainer_gets_code(pair, tmp_path):
    for folder in (pair[0], tmp_path):
        with pytest.raises(ValueError, match="holds no explainer"):
            add_remote_code(folder)
        assert not list(folder.glob("*.py"))
