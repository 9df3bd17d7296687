"""Recipes of the studies: what they are repeated for, what is done again, and what is refused at once."""

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest
from tiny import make_explainer, save_classifier

import tve_hf

EXAMPLE = Path(__file__).parents[3] / "examples" / "reproduce" / "run.py"
COMMON = """
backbone:
  one: {word: a}
  two: {word: "{out}/b"}
task:
  cats:
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("run", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run", module)
    spec.loader.exec_module(module)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "common.yaml").write_text(COMMON)
    monkeypatch.setattr(module, "HERE", folder)
    monkeypatch.setattr(module, "RECIPES", ["mine"])
    return module


def write(tmp_path, *steps):
    (tmp_path / "recipes" / "mine.yaml").write_text(json.dumps({"title": "Mine", "question": "?", "steps": steps}))


def go(study, tmp_path, *options):
    places = ["--data", str(tmp_path / "data"), "--models", str(tmp_path / "models")]
    study.main(["mine", *places, "--output_dir", str(tmp_path / "o"), *options])


def script(code):
    return f"python -c {shlex.quote(code)}"


def seconds_of(tmp_path, name):
    return json.loads((tmp_path / "o" / "compute" / name / "done.json").read_text())["seconds"]


# Counts its own runs, and fails the first time for the task of the second backbone.
FLAKY = (
    "import pathlib, sys; folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True); "
    "count = folder / 'count'; runs = int(count.read_text()) + 1 if count.exists() else 1; "
    "count.write_text(str(runs)); sys.exit(3) if 'two' in sys.argv[1] and runs == 1 else (folder / 'done').touch()"
).replace("{", "{{")


def test_a_failed_study_goes_on_where_it_was(study, tmp_path, capfd):
    step = {"for": ["backbone", "task"], "creates": "{out}/{backbone}-{task}/done", "minutes": 3}
    write(tmp_path, step | {"run": f"{script(FLAKY)} {{out}}/{{backbone}}-{{task}}"})
    with pytest.raises(
        SystemExit, match=r"`python -c .*ended with 3, without .*two-cats/done; .* goes on from there\."
    ):
        go(study, tmp_path)
    assert (
        "Mine: ?\n     3 min" in (said := capfd.readouterr().out) and "2 of 2 steps are left: about 6 minutes" in said
    )
    first = {name: seconds_of(tmp_path, name) for name in ("one-cats", "two-cats")}
    go(study, tmp_path)
    assert "1 of 2 steps are left: about 3 minutes" in capfd.readouterr().out
    counts = {name: (tmp_path / "o" / f"{name}-cats" / "count").read_text() for name in ("one", "two")}
    assert counts == {"one": "1", "two": "2"}
    second = {name: seconds_of(tmp_path, name) for name in ("one-cats", "two-cats")}
    assert second["one-cats"] == first["one-cats"]
    assert second["two-cats"] > first["two-cats"]  # of both runs
    assert study.spent(tmp_path / "o", "two-cats/count") == 0.0


def test_a_part_of_a_study_leaves_the_rest(study, tmp_path):
    touch = script("import sys, pathlib; pathlib.Path(sys.argv[1]).touch()")
    step = {"for": ["backbone"], "run": f"{touch} {{out}}/{{backbone}}.json", "creates": "{out}/{backbone}.json"}
    write(tmp_path, step | {"minutes": 1})
    (tmp_path / "o").mkdir()
    go(study, tmp_path, "--only", "two")
    assert not (tmp_path / "o" / "one.json").exists() and (tmp_path / "o" / "two.json").exists()
    with pytest.raises(SystemExit, match="--only three fits no file of mine"):
        go(study, tmp_path, "--only", "three")


def test_values_may_name_places(study, tmp_path):
    write(tmp_path, {"for": ["backbone"], "run": "echo {word} {data}", "creates": "{out}/{backbone}", "minutes": 1})
    one, two = study.steps_of(study.read("mine"), {"data": "d", "models": "m", "out": "o"})
    assert one.command == ("echo", "a", "d")
    assert two.command == ("echo", "o/b", "d")
    assert one.reads == ("d",)


@pytest.mark.parametrize("dry_run", [True, False])
def test_missing_data_is_named_before_anything_runs(study, tmp_path, dry_run):
    touch = script("import sys, pathlib; pathlib.Path(sys.argv[1]).touch()")
    write(
        tmp_path,
        {"run": f"{touch} {tmp_path}/ran", "creates": "{out}/first", "minutes": 1},
        {"run": "tve-hf evaluate {data}/none/test-*.parquet", "creates": "{out}/second", "minutes": 1},
    )
    with pytest.raises(
        SystemExit, match=r"none/test-\*\.parquet is missing, which `tve-hf evaluate .*` reads; see --data"
    ):
        go(study, tmp_path, *["--dry_run"] * dry_run)
    assert not (tmp_path / "ran").exists()


def test_what_another_step_leaves_need_not_be_there_yet(study, tmp_path):
    write(
        tmp_path,
        {"run": "python make {out}/model", "creates": "{out}/model/config.json", "minutes": 1},
        {"run": "python use {out}/model", "creates": "{out}/used", "minutes": 1},
    )
    go(study, tmp_path, "--dry_run")
    write(tmp_path, {"run": "python use {out}/model", "creates": "{out}/used", "minutes": 1})
    with pytest.raises(SystemExit, match="model is missing"):
        go(study, tmp_path, "--dry_run")


def test_an_explainer_of_another_backbone_is_named_before_anything_runs(study, tmp_path):
    one, other = save_classifier(tmp_path / "one"), save_classifier(tmp_path / "other", hidden_size=32)
    make_explainer(tve_hf.split_classifier(str(one))).save_pretrained(tmp_path / "explainer")
    for folder, fits in ((one, True), (other, False)):
        run = f"tve-hf evaluate --classifier {folder} --model {tmp_path}/explainer"
        write(tmp_path, {"run": run, "creates": "{out}/report.json", "minutes": 1})
        if fits:
            go(study, tmp_path, "--dry_run")
        else:
            with pytest.raises(SystemExit, match="does not serve .*other: it .*; use an explainer"):
                go(study, tmp_path, "--dry_run")


def test_unknown_recipes_are_refused(study, tmp_path):
    with pytest.raises(SystemExit, match="There is no recipe 'yours'; choose among mine"):
        study.main(["yours", "--data", "d", "--models", "m"])


def test_recipes_of_the_repository_are_whole():
    """Every placeholder has a value, every script exists, and nothing is made twice."""
    spec = importlib.util.spec_from_file_location("whole", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["whole"] = module
    spec.loader.exec_module(module)
    steps = [
        step
        for name in module.RECIPES
        for step in module.steps_of(module.read(name), dict(data="d", models="m", out="o"))
    ]
    assert steps
    assert len({step.creates for step in steps}) == len(steps)
    for step in steps:
        assert step.command[0] == "tve-hf" or (module.ROOT / step.command[1]).is_file()
        assert not any("{" in word for word in step.command)
