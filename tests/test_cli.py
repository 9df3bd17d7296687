"""The command line: files, lines, exit codes, and messages that name what is wrong."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import GRID, LABELS, noise_image, save_classifier, save_pair
from transformers import pipeline

from tve_hf import messages
from tve_hf.cli import COMMANDS, main
from tve_hf.evaluation import report
from tve_hf.files import dumps
from tve_hf.pipeline_tve import TransferableAttributionPipeline

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def photos(tmp_path):
    """Three images, of which two share a stem."""
    paths = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "other" / "a.png"]
    for seed, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        noise_image(seed, (40, 30 + seed)).save(path)
    return paths


@pytest.fixture
def explain(pair, tmp_path):
    """Run `tve-hf explain` with the tiny models; results go to tmp_path / "out"."""
    classifier, explainer = pair

    def run(*arguments):
        models = ["--classifier", classifier, "--model", explainer, "--output", tmp_path / "out"]
        return main(["explain", *map(str, [*arguments, *models])])

    return run


def strictly(text):
    """Read JSON, but not the NaN and Infinity that only Python reads."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_overlay_per_image_and_the_raw_map(pair, explain, photos, tmp_path, capsys):
    assert explain(*photos[:2]) == 0
    assert written(tmp_path / "out") == ["a.json", "a.png", "b.json", "b.png"]
    reference = pipeline("transferable-attribution", model=str(pair[1]), classifier=str(pair[0]))
    for photo in photos[:2]:
        (expected,) = reference(photo)
        record = strictly((tmp_path / "out" / f"{photo.stem}.json").read_text())
        assert record["image"] == str(photo)
        (found,) = record["explanations"]
        assert set(found) == {"label", "class_idx", "score", "attribution", "rule", "quality", "overlay"}
        assert np.shape(found["attribution"]) == (GRID, GRID)
        assert np.allclose(found["attribution"], expected["attribution"], atol=1e-6)
        assert all(found[key] == expected[key] for key in ("label", "class_idx", "rule"))
        assert found["score"] == pytest.approx(expected["score"])
        assert found["overlay"] == str(tmp_path / "out" / f"{photo.stem}.png")
        assert np.array_equal(Image.open(found["overlay"]), expected["overlay"])
    out = capsys.readouterr().out
    assert f"{photos[0]}: " in out and f"rule {expected['rule']}" in out and "2 of 2 images" in out


def test_json_lines_are_all_that_is_on_stdout(explain, photos, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"")
    assert explain("--json", "--verify", 3, photos[0], tmp_path / "bad.png", photos[1]) == 1
    out, err = capsys.readouterr()
    records = [strictly(line) for line in out.splitlines()]
    assert [record["image"] for record in records] == [str(photos[0]), str(photos[1])]
    assert records[0] == strictly((tmp_path / "out" / "a.json").read_text())
    assert records[0]["explanations"][0]["verification"]["num_patches"] == 3
    assert "bad.png" in err


def test_top_k_and_labels(explain, photos, tmp_path, capsys):
    assert explain("--top-k", 3, "--json", photos[0]) == 0
    found = strictly(capsys.readouterr().out)["explanations"]
    assert [f["score"] for f in found] == sorted((f["score"] for f in found), reverse=True)
    assert [Path(f["overlay"]).name for f in found] == ["a.1.png", "a.2.png", "a.3.png"]
    assert written(tmp_path / "out") == ["a.1.png", "a.2.png", "a.3.png", "a.json"]
    assert explain("--label", "tabby", "--label", "Sports Car", "--json", photos[1]) == 0
    found = strictly(capsys.readouterr().out)["explanations"]
    assert [f["label"] for f in found] == [LABELS[0], LABELS[6]]


def test_verification_is_shown(explain, photos, capsys):
    assert explain("--verify", 4, photos[0]) == 0
    assert "exact scores of 4 patches: Spearman" in capsys.readouterr().out


def test_one_bad_image_leaves_the_others(explain, photos, tmp_path, capsys):
    bad = tmp_path / "broken.png"
    bad.write_bytes(photos[0].read_bytes()[:60])
    assert explain(photos[0], bad, tmp_path / "missing.png", tmp_path, photos[1]) == 1
    out, err = capsys.readouterr()
    assert written(tmp_path / "out") == ["a.json", "a.png", "b.json", "b.png"]
    lines = err.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("tve-hf: ") for line in lines)
    assert "broken.png" in lines[0] and "missing.png" in lines[1] and "directory" in lines[2]
    assert "2 of 5 images" in out


@pytest.mark.parametrize("failing", [".png", ".json"])
def test_failing_save_leaves_no_part_and_spares_the_others(explain, photos, tmp_path, capsys, monkeypatch, failing):
    def full(path, size):
        Path(path).write_bytes(b"x" * 10)
        raise OSError(28, "No space left on device", str(path))

    save, write_text = Image.Image.save, Path.write_text
    monkeypatch.setattr(
        Image.Image, "save", lambda self, p, *a: full(p, 10) if f"a{failing}" in str(p) else save(self, p, *a)
    )
    monkeypatch.setattr(
        Path, "write_text", lambda self, data: full(self, 10) if f"a{failing}" in str(self) else write_text(self, data)
    )
    assert explain(photos[0], photos[1]) == 1
    assert written(tmp_path / "out") == (["a.png"] if failing == ".json" else []) + ["b.json", "b.png"]
    assert "No space left on device" in capsys.readouterr().err


def test_same_stems_do_not_overwrite_each_other(explain, photos, tmp_path):
    assert explain(photos[0], photos[2], photos[1], photos[0]) == 0
    folder = tmp_path / "out"
    assert written(folder) == sorted(f"{stem}.{end}" for stem in ("a", "a-2", "a-3", "b") for end in ("json", "png"))
    assert strictly((folder / "a-2.json").read_text())["image"] == str(photos[2])
    assert Image.open(folder / "a-2.png").size == (40, 32)


def test_long_name(explain, photos, tmp_path):
    long = tmp_path / ("猫" * 80 + ".png")  # 244 bytes
    photos[0].rename(long)
    assert explain(long) == 0
    assert len(written(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--label", "taby"], ["'taby'", "did you mean", "'tabby'"]),
        (["--label", "tabby", "--top-k", "2"], ["exclude one another"]),
        (["--top-k", "0"], ["top_k is 0"]),
        (["--model", "{classifier}"], ["classifier", "no explainer"]),
        (["--model", "{tmp}"], ["{tmp}"]),
        (["--classifier", "{wide}"], ["24 dimensions", "reads 32", "tve-hf pretrain"]),
        (["--model", "{damaged}"], ["damaged", "cannot be loaded", "again"]),
        (["--model", "{lost}"], ["lost", "model.safetensors"]),
        (["--model", "{odd}"], ["odd", "grid_size=5"]),
        (["--output", "{photo}"], ["a.png"]),
    ],
)
def test_mistakes_end_in_one_sentence(pair, explain, photos, tmp_path, capsys, arguments, parts):
    places = {"classifier": pair[0], "tmp": tmp_path, "photo": photos[0]}
    places |= {name: tmp_path / name for name in ("damaged", "lost", "odd", "wide")}
    if "{wide}" in arguments:
        save_classifier(places["wide"], hidden_size=32)
    config = json.loads((pair[1] / "config.json").read_text())
    weights = (pair[1] / "model.safetensors").read_bytes()
    for name, grid, content in (("damaged", 4, weights[:-9]), ("lost", 4, None), ("odd", 5, weights)):
        places[name].mkdir()
        (places[name] / "config.json").write_text(json.dumps(config | {"grid_size": grid}))
        if content:
            (places[name] / "model.safetensors").write_bytes(content)
    classifier, explainer = pair
    settings = ["--classifier", classifier, "--model", explainer, "--output", tmp_path / "out", photos[0]]
    given = [argument.format(**places) for argument in arguments]
    assert main(["explain", *map(str, settings), *given]) == 1  # of an option given twice, the last one counts
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("tve-hf: ")]
    assert len(lines) == 1 and "Traceback" not in err
    assert all(part.format(**places) in lines[0] for part in parts), lines


def test_usage(capsys):
    assert main([]) == 2
    assert "usage: tve-hf" in capsys.readouterr().err
    assert main(["frobnicate"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "'frobnicate'" in err and "explain" in err
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("explain", "pretrain", "evaluate", "card", "push"))
    with pytest.raises(SystemExit) as caught:
        main(["explain", "--no-such-option"])
    assert caught.value.code == 2


def test_in_a_process_of_its_own(pair, photos, tmp_path):
    command = [sys.executable, "-m", "tve_hf.cli", "explain", photos[0], tmp_path / "missing.png", "--json"]
    models = ["--classifier", pair[0], "--model", pair[1], "--output", tmp_path / "out"]
    done = subprocess.run(
        [*map(str, command), *map(str, models)], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 1
    assert [strictly(line)["image"] for line in done.stdout.splitlines()] == [str(photos[0])]
    assert "missing.png" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [TypeError("NoneType has no len"), KeyError("x"), AttributeError("no y")])
def test_a_bug_is_reported_as_one_and_leaves_the_other_images(explain, photos, tmp_path, capsys, monkeypatch, error):
    postprocess = TransferableAttributionPipeline.postprocess

    def broken(self, outputs):
        if outputs["results"][0]["image"].size == (40, 31):  # of the second photograph
            raise error
        return postprocess(self, outputs)

    monkeypatch.setattr(TransferableAttributionPipeline, "postprocess", broken)
    assert explain(*photos) == 1
    out, err = capsys.readouterr()
    assert written(tmp_path / "out") == ["a-2.json", "a-2.png", "a.json", "a.png"] and "2 of 3 images" in out
    assert "Traceback" in err and "in broken" in err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"tve-hf: '{photos[1]}': unexpected {type(error).__name__}. ") and "please report" in last


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("top_k is\n 0"), "tve-hf: top_k is 0"),
        (FileNotFoundError("no such folder"), "tve-hf: no such folder"),
        (ModuleNotFoundError("No module named 'x'", name="x.y"), "tve-hf: No module named 'x'"),
        (ModuleNotFoundError("No module", name="accelerate"), "tve-hf: No module; run `pip install tve_hf[train]`."),
        (ImportError("too old", name="datasets.arrow"), "tve-hf: too old; run `pip install tve_hf[train]`."),
        (ImportError("This is captum's: pip install it."), "tve-hf: This is captum's: pip install it."),
        (ModuleNotFoundError("No module named 'tve_hf.x'", name="tve_hf.x"), None),
        (TypeError("unsupported operand"), None),
        (KeyError("pixel_values"), None),
        (AttributeError("no attribute"), None),
        (RuntimeError("CUDA error"), None),
    ],
)
def test_what_is_said_of_each_error(error, expected, capsys, monkeypatch):
    def command(arguments):
        raise error

    monkeypatch.setitem(COMMANDS, "info", command)
    if expected:
        assert main(["info"]) == 1
        assert capsys.readouterr().err.strip() == expected
    else:  # Python shows its traceback, and this below it
        with pytest.raises(type(error)) as raised:
            main(["info"])
        assert raised.value is error and "please report" in error.__notes__[0]


def test_the_advice_for_training_names_what_its_extra_brings():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {need.partition(">")[0] for need in extras["train"]} == set(messages._TRAIN)


# Files of arguments


def test_a_recipe_holds_one_argument_a_line_and_what_follows_goes_before_it(explain, photos, tmp_path, capsys):
    recipe = tmp_path / "recipe.args"
    recipe.write_text(f"--top-k=3\n--json\n{photos[0]}\n")
    assert explain(f"@{recipe}") == 0
    assert len(strictly(capsys.readouterr().out)["explanations"]) == 3
    assert explain(f"@{recipe}", "--top-k", 2) == 0
    assert len(strictly(capsys.readouterr().out)["explanations"]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_reads_recipes(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: tve-hf {command} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([command, "@no-such-recipe"])
    assert ended.value.code == 2
    assert "no-such-recipe" in capsys.readouterr().err


def test_settings_of_training_and_evaluation_come_from_recipes_too(tmp_path, monkeypatch):
    from tve_hf import pretrain
    from tve_hf.benchmark import run as benchmark

    (tmp_path / "recipe").write_text("--classifier=from the recipe\n--output_dir=out\n--seed=3\n")
    seen = []
    monkeypatch.setattr(pretrain, "pretrain", seen.append)
    monkeypatch.setattr(benchmark, "evaluate", seen.append)
    monkeypatch.setattr(report, "table_of", str)
    for command, needed in (("pretrain", []), ("evaluate", ["--test_files", "held-out.parquet"])):
        assert main([command, f"@{tmp_path / 'recipe'}", "--seed", "4", *needed]) == 0
        assert (seen[-1].classifier, seen[-1].seed) == ("from the recipe", 4)


def test_default_photograph_and_checkpoints(tmp_path, monkeypatch, capsys):
    pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    assert main(["explain"]) == 0
    assert written(tmp_path / "explanations") == ["chelsea.json", "chelsea.png"]
    assert "chelsea.png: " in capsys.readouterr().out


def test_strict_json():
    nan, inf = float("nan"), float("inf")
    assert strictly(dumps({"a": [1, nan, (inf, -inf)], "b": "NaN"})) == {"a": [1, "nan", ["inf", "-inf"]], "b": "NaN"}
