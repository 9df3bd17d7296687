"""Reports of one set of images become one, as if all methods had been measured in one run."""

import json
from pathlib import Path

import pytest
from scripts import load_example

join_reports = load_example("join_reports")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def whole():
    """A committed report of several methods."""
    return json.loads((ROOT / "model_cards" / "results" / "tiny_imagenet" / "report.json").read_text())


def part(report, specs):
    """What a run of these methods alone would have reported, but for the summary."""
    columns = {k: v for k, v in report["per_image"].items() if "/" not in k or k.partition("/")[0] in specs}
    curves = {key: curve for key, curve in report["curves"].items() if key.partition("/")[2] in specs}
    return report | {"cost": {spec: report["cost"][spec] for spec in specs}, "curves": curves, "per_image": columns}


def test_two_halves_give_the_whole(whole):
    specs = list(whole["cost"])
    joined = join_reports.join([part(whole, specs[:2]), part(whole, specs[2:])], [{}, {}], [set(), set()])
    assert joined["cost"] == whole["cost"] and joined["curves"] == whole["curves"]
    for removal, rows in whole["summary"]["fidelity"].items():
        for spec, row in rows.items():
            for name, value in row.items():
                assert joined["summary"]["fidelity"][removal][spec][name] == pytest.approx(value, abs=2e-4), name


def test_methods_are_renamed_and_left_out_and_the_first_report_counts(whole):
    other = part(whole, ["tve", "random", "exact"])
    renames, left_out = [{}, {"tve": "tve_before"}], [set(), {"exact"}]
    joined = join_reports.join([part(whole, ["tve", "random"]), other], renames, left_out)
    assert list(joined["cost"]) == ["tve", "random", "tve_before"]
    assert joined["settings"] == whole["settings"] | {"methods": ["tve", "random", "tve_before"]}
    assert joined["per_image"]["tve_before/zero/plus"] == whole["per_image"]["tve/zero/plus"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [1, 2]}, "of other images"),
        ({"settings": {"classifier": "another", "test_files": [], "removals": []}}, "differ in classifier"),
    ],
)
def test_other_images_and_other_classifiers_are_refused(whole, change, message):
    with pytest.raises(ValueError, match=message):
        join_reports.join([whole, whole | change], [{}, {}], [set(), set()])
    fewer = whole | {"settings": whole["settings"] | {"removals": ["zero"]}}
    with pytest.raises(ValueError, match="lacks a removal operator"):
        join_reports.join([whole, fewer], [{}, {}], [set(), set()])
