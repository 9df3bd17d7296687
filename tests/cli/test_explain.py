"""tve-hf explain: files, lines, exit codes, and messages that name what is wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import GRID, LABELS, noise_image, save_classifier, save_pair
from transformers import pipeline

from tve_hf import TVEExplainer
from tve_hf.cli import main
from tve_hf.pipeline_tve import TransferableAttributionPipeline

ROOT = Path(__file__).parents[2]


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


def folder_of(photos):
    return photos[0].parent.name


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_overlay_per_image_and_the_raw_map(pair, explain, photos, tmp_path, capsys):
    assert explain(*photos[:2]) == 0
    assert written(tmp_path / "out") == ["a.tve.json", "a.tve.png", "b.tve.json", "b.tve.png"]
    reference = pipeline("transferable-attribution", model=str(pair[1]), classifier=str(pair[0]))
    for photo, (expected,) in zip(photos, reference([*map(str, photos[:2])], batch_size=2), strict=False):
        record = strictly((tmp_path / "out" / f"{photo.stem}.tve.json").read_text())
        assert record["image"] == record["source"] == str(photo)
        (found,) = record["explanations"]
        assert set(found) == {"label", "class_idx", "score", "attribution", "method", "rule", "quality", "picture"}
        assert np.shape(found["attribution"]) == (GRID, GRID)
        assert np.allclose(found["attribution"], expected["attribution"], atol=1e-6)
        assert all(found[key] == expected[key] for key in ("label", "class_idx", "rule"))
        assert found["score"] == pytest.approx(expected["score"])
        assert found["picture"] == str(tmp_path / "out" / f"{photo.stem}.tve.png")
        assert np.array_equal(Image.open(found["picture"]), expected["figure"])
    out = capsys.readouterr().out
    assert f"{photos[0]}: " in out and f"rule {expected['rule']}" in out and "2 of 2 images" in out


def test_json_lines_are_all_that_is_on_stdout(explain, photos, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"")
    assert explain("--json", "--verify", 3, photos[0], tmp_path / "bad.png", photos[1]) == 1
    out, err = capsys.readouterr()
    records = [strictly(line) for line in out.splitlines()]
    assert [record["image"] for record in records] == [str(photos[0]), str(photos[1])]
    assert records[0] == strictly((tmp_path / "out" / "a.tve.json").read_text())
    assert records[0]["explanations"][0]["verification"]["num_patches"] == 3
    assert "bad.png" in err


def test_top_k_and_labels(explain, photos, tmp_path, capsys):
    assert explain("--top-k", 3, "--json", photos[0]) == 0
    found = strictly(capsys.readouterr().out)["explanations"]
    assert [f["score"] for f in found] == sorted((f["score"] for f in found), reverse=True)
    assert [Path(f["picture"]).name for f in found] == ["a.tve.1.png", "a.tve.2.png", "a.tve.3.png"]
    assert written(tmp_path / "out") == ["a.tve.1.png", "a.tve.2.png", "a.tve.3.png", "a.tve.json"]
    assert explain("--label", "tabby", "--label", "Sports Car", "--json", photos[1]) == 0
    found = strictly(capsys.readouterr().out)["explanations"]
    assert [f["label"] for f in found] == [LABELS[0], LABELS[6]]


def test_verification_is_shown(explain, photos, capsys):
    assert explain("--verify", 4, photos[0]) == 0
    assert "exact scores of 4 patches: Spearman" in capsys.readouterr().out


def test_one_bad_image_leaves_the_others(explain, photos, tmp_path, capsys):
    bad = tmp_path / "broken.png"
    bad.write_bytes(photos[0].read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    assert explain(photos[0], bad, tmp_path / "missing.png", tmp_path / "empty", "*.nothing", photos[1]) == 1
    out, err = capsys.readouterr()
    assert written(tmp_path / "out") == ["a.tve.json", "a.tve.png", "b.tve.json", "b.tve.png"]
    lines = err.strip().splitlines()
    assert len(lines) == 4 and all(line.startswith("tve-hf: ") for line in lines)
    said = ("broken.png", "missing.png", "a folder without images", "No file matches the pattern '*.nothing'")
    assert all(part in line for part, line in zip(said, lines, strict=True))
    assert "2 of 6 images" in out


def full_disk(monkeypatch, ending):
    """Saving files of this ending fails half-way."""

    def full(path):
        Path(path).write_bytes(b"x" * 10)
        raise OSError(28, "No space left on device", str(path))

    save, write_text = Image.Image.save, Path.write_text
    monkeypatch.setattr(Image.Image, "save", lambda self, p, **k: full(p) if ending in str(p) else save(self, p, **k))
    monkeypatch.setattr(
        Path, "write_text", lambda self, data: full(self) if ending in str(self) else write_text(self, data)
    )


@pytest.mark.parametrize("ending", ["b.tve.png", "b.tve.json"])
def test_a_full_disk_ends_in_one_sentence_and_leaves_whole_files(
    explain, photos, tmp_path, capsys, monkeypatch, ending
):
    full_disk(monkeypatch, ending)
    assert explain(photos[0], photos[1]) == 1
    assert written(tmp_path / "out") == ["a.tve.json", "a.tve.png"]
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert first.startswith(f"tve-hf: {tmp_path / 'out'} takes no results (No space left on device)")
    assert (
        second == "1 of 2 images are done; their files are whole." and "in " not in out.splitlines()[-1].split("->")[1]
    )


def test_a_rerun_replaces_its_own_results_and_removes_those_of_more_classes(explain, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert explain("--top-k", 3, photos[0]) == 0
    (out / "a.tve.4.png").write_bytes(b"the user's")
    (out / "a.png").write_bytes(b"also theirs")
    before = (out / "a.tve.json").stat().st_mtime_ns
    (out / "a.tve.4.png").unlink()
    assert explain("--plain", photos[0]) == 0
    assert written(out) == ["a.png", "a.tve.json", "a.tve.png"]
    assert (out / "a.tve.json").stat().st_mtime_ns > before and (out / "a.png").read_bytes() == b"also theirs"


def test_in_the_folder_of_the_images_nothing_of_theirs_is_touched(pair, photos, tmp_path, monkeypatch, capsys):
    """The same stem twice, a folder, and a second run that finds the results of the first."""
    monkeypatch.chdir(tmp_path)
    noise_image(7, (33, 31)).save("a.jpg")
    files = [*photos, Path("a.jpg")]
    before = [file.read_bytes() for file in files]
    arguments = ["explain", ".", "--output", ".", "--json", "--quiet"]
    arguments += ["--classifier", str(pair[0]), "--model", str(pair[1])]
    found = []
    for _ in range(2):
        assert main(arguments) == 0
        records = [strictly(line) for line in capsys.readouterr().out.splitlines()]
        found.append({record["source"]: record["explanations"][0]["picture"] for record in records})
    assert [file.read_bytes() for file in files] == before
    assert (
        found[0]
        == found[1]
        == {
            str(tmp_path / "a.jpg"): "a.jpg.tve.png",
            str(tmp_path / "a.png"): "a.png.tve.png",
            str(tmp_path / "b.png"): "b.tve.png",
            str(tmp_path / "other" / "a.png"): "other/a.tve.png",
        }
    )
    assert len([*tmp_path.rglob("*.tve.*")]) == 8


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
        (["--output", "{photo}"], ["a.png is a file", "name a folder"]),
        (["--output", "{photo}/below"], ["a.png is a file"]),
        (["--device", "warp"], ["--device warp", "torch cannot use it", "such as cpu"]),
        (["--batch-size", "0"], ["--batch-size is 0"]),
        (["--rule", "prop"], ["prop", "prob"]),
        (["--class-idx", "99"], ["class_idx 99 is not a class"]),
        (["--images-from", "{photo}"], ["a.png", "no text"]),
        (["--images-from", "{tmp}/nowhere"], ["nowhere", "cannot be read"]),
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


def test_in_a_process_of_its_own(pair, photos, tmp_path):
    command = [sys.executable, "-m", "tve_hf", "explain", photos[0], tmp_path / "missing.png", "--json"]
    models = ["--classifier", pair[0], "--model", pair[1], "--output", tmp_path / "out"]
    done = subprocess.run([*map(str, command), *map(str, models)], capture_output=True, text=True, cwd=ROOT)
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
    assert (
        written(tmp_path / "out")
        == ["other-a.png.tve.json", "other-a.png.tve.png"]
        + [f"{folder_of(photos)}-a.png.tve.{end}" for end in ("json", "png")]
        and "2 of 3 images" in out
    )
    assert "Traceback" in err and "in broken" in err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"tve-hf: '{photos[1]}': unexpected {type(error).__name__}. ") and "please report" in last


def test_a_recipe_holds_one_argument_a_line_and_what_follows_goes_before_it(explain, photos, tmp_path, capsys):
    recipe = tmp_path / "recipe.args"
    recipe.write_text(f"--top-k=3\n--json\n{photos[0]}\n")
    assert explain(f"@{recipe}") == 0
    assert len(strictly(capsys.readouterr().out)["explanations"]) == 3
    assert explain(f"@{recipe}", "--top-k", 2) == 0
    assert len(strictly(capsys.readouterr().out)["explanations"]) == 2


def test_both_spellings_of_options_and_names_that_no_terminal_shows(explain, photos, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"\xff.png")
    photos[0].rename(odd)
    # Understood, for they exclude one another.
    assert explain("--top_k", 2, "--batch_size=1", "--class_idx", 1, odd) == 1
    assert "exclude one another" in capsys.readouterr().err
    assert explain("--top_k", 2, "--json", odd) == 0
    assert strictly(capsys.readouterr().out)["image"] == str(odd)


def test_quiet_says_nothing_but_errors(explain, photos, tmp_path, capsys):
    assert explain("--quiet", photos[0]) == 0
    assert capsys.readouterr() == ("", "")
    assert explain("--quiet", tmp_path / "missing.png") == 1
    out, err = capsys.readouterr()
    assert out == "" and "missing.png" in err and len(err.splitlines()) == 1


def test_traceback_is_shown_where_it_is_asked_for(explain, photos, tmp_path, capsys):
    assert explain("--traceback", "--top-k", 0, photos[0]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("tve-hf: top_k is 0")
    assert explain("--traceback", tmp_path / "missing.png") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "please report" not in err


@pytest.mark.parametrize(
    "options", [["--dtype", "bfloat16", "--device", "cpu"], ["--rule", "logit", "--label", "crane"]]
)
def test_options_reach_the_pipeline(pair, explain, photos, capsys, options):
    if "--label" in options:  # two classes have this name
        assert explain(*options, photos[0]) == 1
        assert "pass one of them as class_idx" in capsys.readouterr().err
        options[2:] = ["--class-idx", "4", "--class-idx", "0"]
    assert explain(*options, "--json", photos[0]) == 0
    found = strictly(capsys.readouterr().out)["explanations"]
    settings = {"dtype": torch.bfloat16} if "--dtype" in options else {}
    asked = {} if settings else {"rule": "logit", "class_idx": [4, 0]}
    explainer = TVEExplainer.from_pretrained(pair[1], **settings)
    reference = pipeline("transferable-attribution", model=explainer, classifier=str(pair[0]), **settings)
    for one, other in zip(found, reference(str(photos[0]), **asked), strict=True):
        assert one["class_idx"] == other["class_idx"] and one["rule"] == other["rule"]
        assert np.allclose(one["attribution"], other["attribution"], atol=1e-6)


class Stub:
    """A pipeline whose results have a figure, and no rule, as those of other methods may."""

    has_explainer = False
    device = torch.device("cpu")

    def __call__(self, images, batch_size=1):
        if isinstance(images, list):
            return [self(image) for image in images]
        drawn = {"overlay": Image.new("RGB", (3, 3)), "figure": Image.new("RGB", (5, 5))}
        return [{"label": "cat", "class_idx": 0, "score": 0.5, "attribution": np.eye(2, dtype=np.float32), **drawn}]


@pytest.mark.parametrize(
    ("options", "size"), [([], (5, 5)), (["--plain"], (3, 3)), (["--blocky", "--full-size"], (5, 5))]
)
def test_a_method_is_named_to_the_pipeline_and_its_figure_saved(photos, tmp_path, monkeypatch, capsys, options, size):
    asked = []
    monkeypatch.setattr(transformers, "pipeline", lambda *args, **kwargs: asked.append((args, kwargs)) or Stub())
    arguments = ["explain", *photos[:2], "--method", "grad_cam", "--classifier", "mine", "--output", tmp_path / "out"]
    assert main([*map(str, arguments), *options]) == 0
    drawing = {"smooth": False, "max_size": None} if "--blocky" in options else {}
    assert asked == [(("transferable-attribution",), {"classifier": "mine", "method": "grad_cam"} | drawing)]
    assert Image.open(tmp_path / "out" / "a.tve.png").size == size
    assert "cat (50.0%)" in (out := capsys.readouterr().out) and "[grad_cam]" in out


# Standard input, and ends that nobody wants


def in_a_process(*arguments, **settings):
    return subprocess.Popen(
        [sys.executable, "-m", "tve_hf", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        **settings,
    )


def test_an_image_on_standard_input(pair, photos, tmp_path):
    """Another image does not replace the results of the first."""
    models = ["--classifier", pair[0], "--model", pair[1], "--output", tmp_path / "out"]
    for photo, name in ((photos[0], "stdin.tve.png"), (photos[1], "stdin-")):
        process = in_a_process("explain", "-", "--json", *models)
        out, err = process.communicate(photo.read_bytes())
        assert process.returncode == 0, err
        assert Path(strictly(out)["explanations"][0]["picture"]).name.startswith(name)
    assert len(written(tmp_path / "out")) == 4


def test_a_reader_that_goes_away_is_no_bug(pair, photos, tmp_path):
    models = ["--classifier", pair[0], "--model", pair[1], "--output", tmp_path / "out", "--batch-size", "1"]
    process = in_a_process("explain", *photos, *models)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 141
    assert "nobody reads the output" in err and "Traceback" not in err and "Exception ignored" not in err
    assert not [*(tmp_path / "out").glob(".*")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_whole_files(explain, photos, tmp_path, capsys, monkeypatch, number, code):
    postprocess = TransferableAttributionPipeline.postprocess
    original = signal.getsignal(number)
    if number == signal.SIGINT:  # which a shell lets its background jobs ignore
        signal.signal(number, signal.default_int_handler)
    before = signal.getsignal(number)

    def interrupted(self, outputs):
        if outputs["results"][0]["image"].size == (40, 31):  # of the second photograph
            signal.raise_signal(number)
        return postprocess(self, outputs)

    monkeypatch.setattr(TransferableAttributionPipeline, "postprocess", interrupted)
    try:
        assert explain("--batch-size", 1, *photos[:2]) == code
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, original)
    err = capsys.readouterr().err
    assert err.startswith("tve-hf: interrupted.") and "their files are whole" in err and len(err.splitlines()) == 2
    names = {path.name for path in (tmp_path / "out").glob("*")}  # none, if the first was not yet begun
    assert names <= {"a.tve.json", "a.tve.png"} and not [*(tmp_path / "out").glob(".*")]


def test_default_photograph_and_checkpoints(tmp_path, monkeypatch, capsys):
    pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    assert main(["explain"]) == 0
    assert written(tmp_path / "explanations") == ["chelsea.tve.json", "chelsea.tve.png"]
    assert "chelsea.png: " in capsys.readouterr().out
