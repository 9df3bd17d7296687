"""The page of results: cells are those of the files, findings name no other number, and what is not done is said."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "examples" / "reproduce"
COMMON = "backbone: {one: {}, two: {}}\ntask: {cats: , digits: }\n"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(tmp_path, monkeypatch):
    for name in ("run", "report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    module = load("report")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "common.yaml").write_text(COMMON)
    monkeypatch.setattr(module.recipes, "HERE", tmp_path / "recipes")
    monkeypatch.setattr(module.recipes, "RECIPES", ["mine"])
    yield module
    for name in ("run", "report"):
        sys.modules.pop(name, None)


def write_recipe(tmp_path, **more):
    step = {"for": ["backbone", "task"], "run": "echo", "creates": "{out}/{backbone}/{task}.json", "minutes": 1}
    recipe = {"number": 1, "title": "Mine", "question": "Which?", "steps": [step], **more}
    (tmp_path / "recipes" / "mine.yaml").write_text(json.dumps(recipe))


def write_result(tmp_path, backbone, task, content):
    path = tmp_path / "o" / backbone / f"{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def go(report, tmp_path):
    report.main(
        [
            "--data",
            "d",
            "--models",
            "m",
            "--output_dir",
            str(tmp_path / "o"),
            "--page",
            str(tmp_path / "new" / "page.md"),
        ]
    )
    return (tmp_path / "new" / "page.md").read_text()


def fidelity(**gaps):
    rows = {
        spec: {"plus_auc": [0.5, 0], "minus_auc": [0.5 - gap, 0], "gap": [gap, 0]}
        | ({} if spec == "tve" else {"gap_above_tve": [gap - 0.35, gap - 0.25]})
        for spec, gap in gaps.items()
    }
    return {"summary": {"fidelity": {"zero": rows}}}


TABLE = {"caption": "How many.", "rows": ["backbone"], "columns": ["task"], "reads": "{out}/{backbone}/{task}.json"}


def test_cells_are_those_of_the_files(report, tmp_path):
    options = {"kind": "gap", "options": {"removal": "zero"}}
    areas = {"kind": "fidelity", "options": {"removal": "zero"}}
    write_recipe(tmp_path, tables=[TABLE | options, TABLE | areas])
    for backbone in ("one", "two"):
        write_result(tmp_path, backbone, "cats", fidelity(random=0.0, tve=0.3))
        write_result(tmp_path, backbone, "digits", fidelity(tve=0.2))
    for name, seconds in (("one/cats.json", 5400), ("two/digits.json", 1800), ("of another recipe", 900)):
        path = tmp_path / "o" / "compute" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds": seconds}))
    page = go(report, tmp_path)
    assert "They took 2.0 hours." in page and "## Mine\n\nWhich?\n\nHow many." in page and "Not done" not in page
    assert "|  | cats | digits |\n| --- | --- | --- |\n| one, tve | 0.300 | 0.200 |" in page  # the best first
    assert "| one, random | 0.000 (-0.350 to -0.250) |  |" in page
    assert "| two, tve | 0.50 / 0.20 | 0.50 / 0.30 |" in page
    kept = json.loads((tmp_path / "new" / "page.json").read_text())
    assert kept["tables"]["mine"][0]["two, tve"] == {"cats": "0.300", "digits": "0.200"}


def test_gaps_beside_another_method(report, tmp_path):
    """The interval is of paired differences: where all images have the same one, it is that, however they differ."""
    options = {"kind": "gap", "options": {"removal": "zero", "beside": "lime"}}
    write_recipe(tmp_path, tables=[TABLE | options])
    lime = [0.1, 0.7, 0.4]
    found = fidelity(lime=0.4, tve=0.6, random=0.1)
    found["per_image"] = {f"{spec}/zero/minus": [0.1] * 3 for spec in ("lime", "tve", "random")} | {
        "lime/zero/plus": [value + 0.1 for value in lime],
        "tve/zero/plus": [value + 0.3 for value in lime],
        "random/zero/plus": [0.2, 0.2, 0.2],
    }
    write_result(tmp_path, "one", "cats", found)
    page = go(report, tmp_path)
    assert "| one, tve | 0.600 (+0.200 to +0.200) |" in page and "| one, lime | 0.400 |" in page
    # One draw in 27 is the second image thrice, and one the first.
    assert "| one, random | 0.100 (-0.600 to +0.000) |" in page


def test_named_files_have_rows_of_their_own_and_missing_ones_none(report, tmp_path):
    reads = {"head alone": "{out}/{backbone}/{task}.json", "all weights": "{out}/all/{backbone}-{task}.json"}
    write_recipe(tmp_path, tables=[TABLE | {"kind": "accuracy", "reads": reads}])
    for backbone in ("one", "two"):
        for task in ("cats", "digits"):
            write_result(tmp_path, backbone, task, {"eval_accuracy": 0.8125})
    write_result(tmp_path, "all", "two-cats", {"eval_accuracy": 0.9})
    page = go(report, tmp_path)
    assert "| two, all weights | 90.0 % |  |" in page and "| one, head alone | 81.2 % | 81.2 % |" in page
    assert "one, all weights" not in page


def test_findings_name_no_other_number(report, tmp_path):
    table = TABLE | {"kind": "accuracy"}
    for finding, fits in (("It has 90.0 % everywhere.", True), ("It has 91.0 % somewhere.", False)):
        write_recipe(tmp_path, tables=[table], findings=[finding])
        for backbone in ("one", "two"):
            for task in ("cats", "digits"):
                write_result(tmp_path, backbone, task, {"eval_accuracy": 0.9})
        if fits:
            assert f"* {finding}" in go(report, tmp_path)
            before = (tmp_path / "new" / "page.md").read_text()
        else:
            with pytest.raises(SystemExit, match=r"Mine: 91\.0 is in none of its tables, but in: It has 91\.0 %"):
                go(report, tmp_path)
            assert (tmp_path / "new" / "page.md").read_text() == before


def test_a_study_that_is_not_done_shows_what_there_is_and_says_so(report, tmp_path):
    write_recipe(tmp_path, tables=[TABLE | {"kind": "accuracy"}])
    assert go(report, tmp_path).endswith("## Not done\n\n* Mine: 4 of 4 steps are left.\n")
    assert "## Mine" not in (tmp_path / "new" / "page.md").read_text()
    write_result(tmp_path, "one", "cats", {"eval_accuracy": 0.9})
    page = go(report, tmp_path)
    assert page.endswith("## Not done\n\n* Mine: 3 of 4 steps are left.\n")
    assert "|  | cats |\n| --- | --- |\n| one | 90.0 % |" in page


def test_what_was_left_on_another_machine_stays(report, tmp_path):
    figure = {"caption": "How it looks.", "for": ["backbone", "task"], "reads": "{out}/{backbone}/{task}.png"}
    options = {"kind": "gap", "options": {"removal": "zero"}}
    write_recipe(tmp_path, tables=[TABLE | options], figures=[figure])
    write_result(tmp_path, "one", "cats", fidelity(tve=0.3, lime=0.2, rise=0.1))
    write_result(tmp_path, "one", "digits", fidelity(lime=0.4, tve=0.1))
    write_result(tmp_path, "two", "cats", fidelity(tve=0.5))
    (tmp_path / "o" / "one" / "cats.png").write_bytes(b"drawn")
    ledger = tmp_path / "o" / "compute" / "one" / "cats.json.json"
    ledger.parent.mkdir(parents=True)
    ledger.write_text(json.dumps({"seconds": 5400}))
    first = go(report, tmp_path)
    assert "They took 1.5 hours." in first and "* Mine: 1 of 4 steps are left." in first

    (tmp_path / "o").rename(tmp_path / "elsewhere")
    assert go(report, tmp_path) == first
    write_result(tmp_path, "one", "cats", fidelity(tve=0.35, lime=0.2))  # again, without one of the methods
    write_result(tmp_path, "two", "digits", fidelity(tve=0.25))
    (tmp_path / "o" / "compute" / "two").mkdir(parents=True)
    (tmp_path / "o" / "compute" / "two" / "digits.json.json").write_text(json.dumps({"seconds": 1800}))
    page = go(report, tmp_path)
    assert "They took 2.0 hours." in page and "Not done" not in page and page.count("![") == 1
    assert "| one, tve | 0.350 | 0.100 |" in page and "| two, tve | 0.500 | 0.250 |" in page
    assert "| one, lime | 0.200 (-0.150 to -0.050) | 0.400 (+0.050 to +0.150) |" in page and "rise" not in page
    assert (tmp_path / "new" / "page" / "mine-one-cats-cats.png").read_bytes() == b"drawn"


def test_ratios_are_those_of_the_bench(report, tmp_path):
    table = TABLE | {"kind": "ratio", "rows": [], "columns": ["backbone"], "reads": "{out}/{backbone}/cats.json"}
    write_recipe(tmp_path, tables=[table])
    for backbone, ratio in (("one", 1.05), ("two", 1.2)):
        rows = [{"name": "prediction", "ratio": 1.0, "interval": [1.0, 1.0]}]
        rows.append({"name": "tve", "ratio": ratio, "interval": [ratio - 0.01, ratio + 0.02]})
        for task in ("cats", "digits"):
            write_result(tmp_path, backbone, task, {"measured": [{"rows": rows}]})
    page = go(report, tmp_path)
    assert "|  | one | two |" in page and "| tve | 1.05 (1.04 to 1.07) | 1.20 (1.19 to 1.22) |" in page


def test_losses_are_the_first_and_the_last_of_a_log(report, tmp_path):
    write_recipe(tmp_path, tables=[TABLE | {"kind": "loss"}])
    log = [{"step": 5, "loss": 1.25}, {"step": 10, "loss": 0.75}, {"step": 12, "logit_r2": 0.5}]
    for backbone in ("one", "two"):
        for task in ("cats", "digits"):
            write_result(tmp_path, backbone, task, {"log": log})
    page = go(report, tmp_path)
    assert "| one, first | 1.250 | 1.250 |" in page and "| two, last | 0.750 | 0.750 |" in page


def test_gaps_by_masked_passes(report, tmp_path):
    write_recipe(tmp_path, tables=[TABLE | {"kind": "passes", "rows": [], "columns": ["backbone", "task"]}])
    zero, blur = ({"gap": gap, "interval": [gap - 0.01, gap + 0.02]} for gap in (0.3, 0.1))
    rows = [{"backgrounds": "random", "passes": 20000, "zero": zero, "blur": blur}]
    for backbone in ("one", "two"):
        for task in ("cats", "digits"):
            write_result(tmp_path, backbone, task, {"rows": rows})
    cell = "0.300 (0.290 to 0.320) / 0.100 (0.090 to 0.120)"
    assert f"| random, 20,000 passes | {' | '.join([cell] * 4)} |" in go(report, tmp_path)


def test_estimates_are_those_under_the_keys_with_their_intervals(report, tmp_path):
    rows = {"clean": [0.25, 0.2, 0.3], "noise": [0.125, "nan", "nan"], "fog": ["nan", "nan", "nan"]}
    write_recipe(tmp_path, tables=[TABLE | {"kind": "estimates", "options": {"at": ["gap", "zero"]}}])
    for backbone in ("one", "two"):
        for task in ("cats", "digits"):
            write_result(tmp_path, backbone, task, {"summary": {"gap": {"zero": rows, "blur": {}}}})
    page = go(report, tmp_path)
    assert "| one, clean | 0.250 (0.200 to 0.300) | 0.250 (0.200 to 0.300) |" in page
    assert "| two, noise | 0.125 | 0.125 |" in page and "| two, fog |  |  |" in page


def test_pictures_stand_beside_the_page_and_missing_ones_nowhere(report, tmp_path):
    figure = {"caption": "How it looks.", "for": ["backbone", "task"], "reads": "{out}/{backbone}/{task}.png"}
    write_recipe(tmp_path, tables=[TABLE | {"kind": "accuracy"}], figures=[figure])
    for backbone in ("one", "two"):
        for task in ("cats", "digits"):
            write_result(tmp_path, backbone, task, {"eval_accuracy": 0.9})
    (tmp_path / "o" / "two" / "cats.png").write_bytes(b"drawn")
    page = go(report, tmp_path)
    assert "How it looks.\n\n![mine-two-cats-cats](page/mine-two-cats-cats.png)" in page and page.count("![") == 1
    assert (tmp_path / "new" / "page" / "mine-two-cats-cats.png").read_bytes() == b"drawn"
    assert [path.name for path in (tmp_path / "new" / "page").iterdir()] == ["mine-two-cats-cats.png"]


def test_perturbation_has_both_orders_in_per_cent(report, tmp_path):
    table = TABLE | {"kind": "perturbation", "options": {"explained": "true"}, "rows": [], "columns": ["backbone"]}
    write_recipe(tmp_path, tables=[table | {"reads": "{out}/{backbone}/cats.json"}])
    own = {"negative": {"mean": 0.5471}, "positive": {"mean": 0.1525}}
    other = {
        "negative": {"mean": 0.531, "above": -0.0161, "above_interval": [-0.031, -0.002]},
        "positive": {"mean": 0.2006, "above": 0.0481, "above_interval": [0.0301, 0.0649]},
    }
    for backbone in ("one", "two"):
        for task in ("cats", "digits"):
            content = {"accuracy": 0.8125, "summary": {"true": {"rollout": other, "legrad": own}}}
            write_result(tmp_path, backbone, task, content)
    rollout = "53.1 / 20.1 (-3.1 to -0.2 / +3.0 to +6.5)"
    page = go(report, tmp_path)
    assert "|  | one | two |\n| --- | --- | --- |\n| accuracy of the whole images | 81.2 | 81.2 |\n" in page
    assert f"| rollout | {rollout} | {rollout} |\n| legrad | 54.7 / 15.2 |" in page


def test_segmentation_has_three_measures_in_per_cent(report, tmp_path):
    table = TABLE | {"kind": "segmentation", "rows": [], "columns": ["backbone"]}
    write_recipe(tmp_path, tables=[table | {"reads": "{out}/{backbone}/cats.json"}])
    for backbone, methods in (("one", ["grad_cam"]), ("two", ["grad_cam", "legrad"])):
        row = {"pixel_accuracy": {"mean": 0.775}, "mean_iou": 0.587, "average_precision": {"mean": 0.825}}
        for task in ("cats", "digits"):
            write_result(tmp_path, backbone, task, {"methods": dict.fromkeys(methods, row)})
    page = go(report, tmp_path)
    cell = "77.5 / 58.7 / 82.5"
    assert f"| grad_cam | {cell} | {cell} |\n| legrad |  | {cell} |" in page  # attention has no map of a CNN


def test_theorem_1_is_told_of_both_kinds_of_explainers(report, tmp_path):
    plain = {"images": 4, "with_bound": 3, "within_bound": 3, "median_epsilon": 0.8125, "median_error_nats": 0.25}
    spread = {"median_error": 0.25, "median_bound": "inf", "median_size": 0.5, "below_size": 2, "within": 4}
    random = plain | {"spread": spread, "halves": plain | {"with_bound": 4}, "sampling_share": {"prob": 0.125}}
    table = TABLE | {"kind": "theorem"}
    write_recipe(tmp_path, tables=[table, table | {"options": {"of": "halves"}}])
    for backbone, summary in (("one", random), ("two", plain | {"halves": plain})):
        for task in ("cats", "digits"):
            write_result(tmp_path, backbone, task, {"summary": summary})
    page = go(report, tmp_path)
    assert "| one, ε < 1 | 3 of 4 images, 3 within the bound | 3 of" in page
    assert "| one, ε < 1 | 4 of 4 images" in page
    assert "| one, spread | 0.2500 / inf / 0.5000, 2 |" in page and "two, spread" not in page
    assert "| one, share of sampling, prob | 12 % |" in page and "| two, median ε | 0.81 |" in page


def test_embeddings_are_told_by_their_spread_and_likeness(report, tmp_path):
    write_recipe(tmp_path, tables=[TABLE | {"kind": "embeddings"}])
    for backbone, after in (("one", 2.4375), ("two", 15.5)):
        for task in ("cats", "digits"):
            found = {"directions": {"before": 20.25, "after": after}, "likeness": 0.8125}
            write_result(tmp_path, backbone, task, found)
    page = go(report, tmp_path)
    assert "| one, directions, before | 20.2 | 20.2 |\n| one, directions, after | 2.4 | 2.4 |\n" in page
    assert "| two, likeness | 0.81 | 0.81 |" in page
