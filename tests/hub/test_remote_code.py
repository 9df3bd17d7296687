"""A saved explainer with its code, used where this package is not installed, and where it is."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from stranger import explain_elsewhere
from tiny import noise_image, save_pair
from transformers import pipeline
from transformers.dynamic_module_utils import get_relative_import_files

from tve_hf.hub.remote_code import code_files, config_with_code


def add_code(folder: Path) -> None:
    """What a push sends, in a folder here."""
    (folder / "config.json").write_text(config_with_code(folder))
    for name, text in code_files().items():
        (folder / name).write_text(text)


@pytest.fixture
def pair(tmp_path):
    classifier, explainer = save_pair(tmp_path)
    noise_image(0).save(tmp_path / "noise.png")
    return classifier, explainer, tmp_path / "noise.png"


def test_works_without_the_package(site, pair, tmp_path):
    classifier, explainer, image = pair
    ours = pipeline("transferable-attribution", model=str(explainer), classifier=str(classifier))(str(image))
    add_code(explainer)
    found = explain_elsewhere(site, explainer, classifier, image, tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["module"].startswith("transformers_modules.")
    assert np.allclose(result["attribution"], ours[0]["attribution"], atol=1e-5)


def test_runs_nothing_unless_trusted(site, pair, tmp_path):
    add_code(pair[1])
    (pair[1] / "pipeline_tve.py").write_text("open('ran', 'w')\n")
    found = explain_elsewhere(site, pair[1], pair[0], pair[2], tmp_path, trust=False)
    assert found.returncode != 0 and "trust_remote_code" in found.stderr
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "modules").rglob("*tve*"))


@pytest.mark.parametrize("trust", [None, True, False])
def test_with_the_package_its_own_classes_are_used(pair, trust, tmp_path):
    classifier, explainer, image = pair
    add_code(explainer)
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


def test_code_is_flat_and_complete_to_the_loader_of_transformers(tmp_path):
    files = code_files()
    for name, text in files.items():
        assert "/" not in name
        (tmp_path / name).write_text(text)
    roots = [tmp_path / f"{name}.py" for name in ("configuration_tve", "modeling_tve", "pipeline_tve")]
    needed = {Path(file).name for root in roots for file in get_relative_import_files(root)}
    assert needed | {root.name for root in roots} == files.keys()
    assert {"patches.py", "classifiers.py", "classifiers_tracing.py"} <= files.keys()
    assert not files.keys() & {"cli.py", "benchmark.py", "pretrain.py", "__init__.py"}


def test_code_is_the_packages_but_for_its_imports():
    package = Path(__file__).parents[2] / "tve_hf"
    texts = code_files()
    for flat, path in {"patches.py": "patches.py", "classifiers_tracing.py": "classifiers/tracing.py"}.items():
        ours, theirs = (
            [ast.dump(node) for node in ast.parse(text).body if not isinstance(node, ast.ImportFrom)]
            for text in ((package / path).read_text(), texts[flat])
        )
        assert ours == theirs


def test_only_an_explainer_gets_code(pair, tmp_path):
    for folder in (pair[0], tmp_path):
        with pytest.raises(ValueError, match="holds no explainer"):
            config_with_code(folder)
