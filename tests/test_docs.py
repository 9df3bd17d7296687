"""Numbers in the documents are those of the JSON files beside them."""

import json
import re
from pathlib import Path

import pytest

from tve_hf.evaluation.report import table_of

ROOT = Path(__file__).resolve().parents[1]
REPORTS = sorted((ROOT / "docs" / "comparison").glob("*/report.json"))
OBJECTIVES = json.loads((ROOT / "model_cards" / "results" / "objective.json").read_text())["cases"]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_tables_are_those_of_the_reports(path) -> None:
    report = json.loads(path.read_text())
    assert path.with_name("table.md").read_text() == table_of(report) + "\n"
    assert f"comparison/{path.parent.name}/table.md" in (ROOT / "docs" / "comparison.md").read_text()
    assert report["num_images"] == len(report["rows"]) == 100


def test_what_a_masked_pass_teaches_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "docs" / "comparison" / "passes.json").read_text())["rows"]
    text = (ROOT / "docs" / "comparison.md").read_text().split("## What a masked pass teaches")[1].split("\n## ")[0]
    assert {row["passes"] for row in rows} == {20_000, 80_000}
    for row in rows:
        name = {"antithetical": "two", "random": "random"}[row["backgrounds"]]
        gaps = [[row[removal]["gap"], *row[removal]["interval"]] for removal in ("zero", "blur")]
        cells = " | ".join("{:.3f} ({:.3f} to {:.3f})".format(*values) for values in gaps)
        assert f"| {row['passes']:,} | {name} | {cells} |" in text


def test_which_backgrounds_is_what_the_study_found() -> None:
    cases = json.loads((ROOT / "docs" / "comparison" / "backgrounds.json").read_text())["cases"]
    text = (ROOT / "docs" / "comparison.md").read_text().split("## Which backgrounds")[1].split("\n## ")[0]
    vit, cnn = cases["vit-tiny-tiny-imagenet, P=8"], cases["mobilenet_v2_1.0_224_imagenet, P=14"]
    ways = [(vit, way, "zero") for way in ("independent/prob/as they are", "smooth 0.7/prob/as they are")]
    ways += [(vit, "two states/prob/one hop", "zero"), (vit, "smooth 0.7/prob/as they are", "blur")]
    ways += [(vit, "smooth 0.7, half blurred/prob/as they are", removal) for removal in ("zero", "blur")]
    ways += [(cnn, f"{source}/prob/one hop", "zero") for source in ("smooth 1.5", "smooth 0.7", "independent")]
    both = ("smooth 0.7", "smooth 0.7, half blurred")
    ways += [(cnn, f"{source}/prob/one hop", removal) for source in both for removal in ("zero", "blur")]
    found = {f"{table[way][removal]['gap']:.3f}" for table, way, removal in ways}
    assert found == set(re.findall(r"0\.\d{3}", text))
    # What is said of all sources, and of every distribution.
    for way, row in cnn.items():
        source, rule, averaging = way.split("/")
        if (rule, averaging) == ("prob", "one hop"):
            plain = cnn[f"{source}/prob/as they are"]
            assert all(row[removal]["gap"] > plain[removal]["gap"] for removal in ("zero", "blur"))
    for table in (vit, cases["vit-tiny-cats-vs-dogs, P=8"]):
        best: dict[str, float] = {}
        for way, row in table.items():
            source = way.split("/")[0]
            best[source] = max(best.get(source, 0), row["zero"]["gap"])
        assert min(best, key=lambda source: best[source]) == "two states"


@pytest.mark.parametrize(
    ("folder", "batch", "start"),
    [
        ("vit_base", 8, "| ViT-B/16 | 8 |"),
        ("vit_base", 16, "| ViT-B/16 | 16 |"),
        ("vit_large", 8, "| ViT-L/16 | 8 |"),
        ("mobilenet_v2", 16, "| MobileNetV2, 14 × 14 patches | 16 |"),
        ("mobilenet_v2_channels_last", 16, "| the same, channels last | 16 |"),
        ("mobilenet_v2_wide", 16, "| the same, an explainer twice as wide | 16 |"),
    ],
)
def test_what_explanations_cost_is_what_was_measured(folder, batch, start) -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "speed" / folder / "speed.json").read_text())
    (rows,) = [entry["rows"] for entry in report["measured"] if entry["batch_size"] == batch]
    measured = {row["name"]: row for row in rows}
    line = next(line for line in (ROOT / "docs" / "speed.md").read_text().splitlines() if line.startswith(start))
    tve = measured["tve"]
    low, high = tve["interval"]
    assert f"| {tve['ratio']:.3f} ({low:.3f} to {high:.3f}) |" in line
    for name in {"legrad_last_2", "legrad", "grad_cam", "tve_research"} & measured.keys():
        assert f"{measured[name]['ratio']:.2f}" in line, name


FAMILIES = ["vit-base", "vit-large", "deit-base", "swin-base", "swin-large", "resnet-101", "resnet-152"]


def test_what_explanations_cost_while_the_classifier_grows_is_what_was_measured() -> None:
    text = (ROOT / "docs" / "speed.md").read_text().split("## While the classifier grows")[1].split("\n## ")[0]
    lines = {
        line.split("|")[1].strip(" `"): line.split("|")[2:-1] for line in text.splitlines() if line.startswith("|")
    }
    ratios: dict[str, list[float]] = {}
    for column, name in enumerate(FAMILIES):
        path = ROOT / "benchmarks" / "results" / "speed" / "families" / name / "speed.json"
        (entry,) = json.loads(path.read_text())["measured"]
        rows = {row["name"]: row for row in entry["rows"]}
        assert lines["prediction, ms"][column].strip() == f"{1000 * rows['prediction']['seconds']:.0f}"
        for method in lines.keys() - {"", "---", "prediction, ms"}:
            expected = f"{rows[method]['ratio']:.2f}" if method in rows else "–"
            assert lines[method][column].strip() == expected, (name, method)
            ratios.setdefault(method, []).append(rows[method]["ratio"] if method in rows else float("nan"))
    assert ratios.keys() == {row for row in lines if row not in ("", "---", "prediction, ms")}
    # As the text says: the larger of each family has the lower ratio under TVE; what takes many passes has not.
    for small, large in ((0, 1), (3, 4), (5, 6)):
        assert ratios["tve"][large] < ratios["tve"][small]
        assert ratios["rise@50"][large] > 0.8 * ratios["rise@50"][small]


@pytest.mark.parametrize(("file", "name"), [("vit", "ViT"), ("cnn", "MobileNetV2")])
def test_what_fewer_bits_lose_is_what_was_measured(file, name) -> None:
    text = (ROOT / "docs" / "speed.md").read_text()
    for row in json.loads((ROOT / "benchmarks" / "results" / f"precision_{file}.json").read_text())["rows"]:
        cells = [f"{row['same_class']:.0%}".replace("%", " %"), f"{row['spearman']:.4f}"]
        cells += [f"{row[removal]['gap']:.4f}" for removal in ("zero", "blur")]
        assert f"| {name} | {row['dtype']} | {' | '.join(cells)} |" in text
        assert all(abs(end) <= 0.005 for removal in ("zero", "blur") for end in row[removal]["above_float32"])


def test_how_small_an_explainer_may_be_is_what_was_measured() -> None:
    text = (ROOT / "docs" / "speed.md").read_text()
    report = json.loads((ROOT / "docs" / "comparison" / "sizes.json").read_text())
    for row in report["rows"]:
        gaps = [[row[removal]["gap"], *row[removal]["interval"]] for removal in ("zero", "blur")]
        cells = " | ".join("{:.3f} ({:.3f} to {:.3f})".format(*values) for values in gaps)
        size = row["size"].replace("x", " × ")
        assert f"| {size} | {row['parameters']:,} | {100 * row['share']:.0f} % | {cells} |" in text
    for front in report["front"].values():  # every size, as the text says
        assert front == [row["size"] for row in report["rows"]]


@pytest.mark.parametrize("case", OBJECTIVES)
def test_what_was_tried_is_what_the_study_found(case) -> None:
    text = (ROOT / "docs" / "imagenet.md").read_text()
    _, text = text.split(f"`{case}`, where exact maps have a fidelity gap of ", 1)
    found = OBJECTIVES[case]
    assert text.startswith(f"{found['exact']['gap']['mean']:.3f}")
    rows = [line.split("|")[2:-1] for line in text.split("\n\n")[1].splitlines()[2:]]
    names = ["eq8", "balanced", "per_dimension", "huber", "kl", "logits", "mean_0.95", "mean_0.98", "mean_0.995"]
    names += ["same_draws", "same_draws_3_times_the_steps"]
    assert len(rows) == len(names)
    for name, cells in zip(names, rows, strict=True):
        measured = [found[name][key] for key in ("kept_error", "removed_error", "spearman", "spearman_eq7", "gap")]
        expected = [f"{value['mean']:.3f}" for value in measured]
        expected.append(" to ".join(f"{v:+.3f}" for v in found[name]["gap"].get("above_eq8", [])).replace("-", "−"))
        assert [cell.strip() for cell in cells] == expected, name


def test_what_is_said_of_the_default_is_what_was_measured() -> None:
    text = (ROOT / "docs" / "comparison.md").read_text().split("## The default in the package")[1].split("\n## ")[0]
    results = ROOT / "model_cards" / "results" / "mobilenet_v2"
    photographs, pets = (
        json.loads((results / task / "report.json").read_text())["summary"]
        for task in ("imagenet_samples", "cats_vs_dogs")
    )
    shares = photographs["tve_share_of_exact"]
    assert f"keeps {shares['zero']:.0%} and {shares['blur']:.0%} of".replace("%", "", 1).replace("%", " %") in text
    foretold = [f"{summary['median_r2']:.0%}".replace("%", " %") for summary in (photographs, pets)]
    assert f"foretells {foretold[0]} of" in text and f"and {foretold[1]} under the other head" in text
    # What cannot be told apart has 0 in its interval, and what is above has not.
    told = {
        removal: {spec: row.get("gap_above_tve") for spec, row in photographs["fidelity"][removal].items()}
        for removal in ("zero", "blur")
    }
    for removal in told:
        assert told[removal]["grad_cam"][1] < 0 and told[removal]["rise@400"][0] < 0 < told[removal]["rise@400"][1]
    assert told["blur"]["exact"][0] < 0 < told["blur"]["exact"][1] and told["zero"]["exact"][0] > 0
    zero, blur = (pets["fidelity"][removal]["exact"]["gap_above_tve"] for removal in ("zero", "blur"))
    assert zero[0] < 0 < zero[1] and blur[1] < 0
    stages = json.loads((ROOT / "docs" / "comparison" / "cnn_stages" / "report.json").read_text())["summary"][
        "fidelity"
    ]
    zero, blur = stages["zero"]["tve_first"], stages["blur"]
    assert zero["gap_above_tve"][0] < 0 < zero["gap_above_tve"][1] and blur["tve_first"]["gap_above_tve"][1] < 0
    assert f"{blur['tve']['gap'][0] - blur['tve_first']['gap'][0]:.3f} when they are blurred" in text
    gaps = [f"{stages[removal][name]['gap'][0]:.3f}" for name in ("tve_deep", "tve") for removal in ("zero", "blur")]
    assert "has {} and {} where `tve` has {} and {} (".format(*gaps) in text
    assert all(stages[removal]["tve_deep"]["gap_above_tve"][1] < 0 for removal in ("zero", "blur"))
    config = json.loads((ROOT / "tve_hf/checkpoints/tve-mobilenet-v2-tiny-imagenet/config.json").read_text())
    share = config["quality"]["fidelity_gap"] / config["quality"]["sampled_fidelity_gap"]
    assert f"{share:.0%} of the gap of maps sampled with 256 passes".replace("%", " %", 1) in text


def test_what_is_said_of_mobilenet_v2_is_what_was_measured() -> None:
    folder = ROOT / "docs" / "comparison"
    text = (folder.parent / "comparison.md").read_text().split("## MobileNetV2")[1].split("\n## ")[0]
    summary = json.loads((folder / "mobilenet_v2" / "report.json").read_text())["summary"]
    shares = [f"{100 * share:.0f} %" for share in summary["tve_share_of_exact"].values()]
    assert "with {} of its gap when removed pixels are zero and {} when".format(*shares) in text
    assert f"foretells {100 * summary['median_r2']:.0f} %" in text
    assert f"correlation {summary['median_faithfulness']:.2f}" in text
    for method in ("grad_cam", "rise@400", "tve_two_states"):
        low = [summary["fidelity"][removal][method]["gap_above_tve"] for removal in ("zero", "blur")]
        assert f"by {-low[0][1]:.3f} to {-low[0][0]:.3f} and {-low[1][1]:.3f} to {-low[1][0]:.3f} (" in text, method
    wide = json.loads((folder / "mobilenet_v2_wide" / "report.json").read_text())["summary"]["fidelity"]
    gaps = {name: [f"{wide[removal][name]['gap'][0]:.3f}" for removal in ("zero", "blur")] for name in wide["zero"]}
    told = "gaps of {} and {}, where `tve` has {} and {}".format(*gaps["tve_wide"], *gaps["tve"])
    assert told in text
    for removal in ("zero", "blur"):
        low, high = wide[removal]["tve_wide"]["gap_above_tve"]
        assert low < 0 < high
    log = json.loads((folder / "mobilenet_v2" / "training.json").read_text())["log"][-1]
    assert f"have {100 * log['fidelity_gap'] / log['sampled_fidelity_gap']:.0f} % of the gap of maps sampled" in text


def test_what_bulk_costs_is_what_was_measured() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "bulk.json").read_text())
    text, rates = (ROOT / "docs" / "bulk.md").read_text(), report["images_per_second"]
    said = "bare predictions {predict:.0f} a second, classifier and explainer {model:.0f}, this command {bulk:.0f}"
    assert said.format(**rates) + f", or {100 * report['bulk_of_model']['median']:.1f} % of them" in text
    said = "{plain:.0f} pictures a second with `--plain` and {pictures:.0f} with text, where the pipeline"
    assert said.format(**rates) in text and f"explains {rates['pipeline']:.0f}:" in text
    cpu = report["cpu_milliseconds"]
    drawn = f"takes {cpu['pictures'] - cpu['pipeline']:.0f} ms of a core, explaining its image {cpu['pipeline']:.0f} ("
    assert drawn in text


def test_what_grows_with_processes_and_what_a_step_is_made_of_is_what_was_measured() -> None:
    results = ROOT / "benchmarks" / "results"
    text = (ROOT / "docs" / "speed.md").read_text()
    one, two = json.loads((results / "processes.json").read_text())["median"].values()
    assert f"{one:.0f} with one, {two:.0f} with two" in text
    share = json.loads((results / "pretrain_profile_vit_base_random.json").read_text())["share"]
    assert f"masked passes take {100 * share['masked_passes']:.0f} % of a step" in text
    assert f"the unmasked pass {100 * share['explainer']:.0f} % (" in text


def test_slopes_of_growth_are_what_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "growth" / "growth.json").read_text())
    of = {(row["classifier"], row["setting"], row["value"]): row["gflops"] for row in rows}
    text = (ROOT / "docs" / "speed.md").read_text().split("## What grows with what")[1]
    thousand = {
        name: (of[name, "num_labels", 1000] - of[name, "num_labels", 10]) / 0.99 for name in ("vit-base", "resnet-101")
    }
    assert f"{thousand['vit-base']:.2f} GFLOP for 1,000 classes" in text
    assert f"{thousand['resnet-101']:.2f} where predictions start from a pooled feature map" in text
    for name in thousand:
        assert of[name, "num_labels", 21841] > 2 * of[name, "num_labels", 10]
        batches = {
            value for (classifier, setting, _), value in of.items() if (classifier, setting) == (name, "batch_size")
        }
        assert max(batches) == pytest.approx(min(batches))


def test_ratios_of_compiled_passes_are_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "compiled.json").read_text())["measured"]
    cnn, vit = (measured[name]["ratio"] for name in ("mobilenet-v2-tiny-imagenet", "vit-tiny-tiny-imagenet"))
    said = f"MobileNetV2 then take {cnn:.2f} times as long, those of the shipped ViT {vit:.2f} times"
    assert said in (ROOT / "docs" / "speed.md").read_text()
    assert f"takes {cnn:.2f} times as long" in (ROOT / "CHANGELOG.md").read_text()


def test_the_page_of_results_shows_what_was_kept() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    kept = json.loads((ROOT / "docs" / "results.json").read_text())
    for tables in kept["tables"].values():
        for row, cells in (item for table in tables for item in table.items()):
            lines = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
            assert any(all(f"| {cell} |" in line for cell in cells.values()) for line in lines), row
    assert f"They took {sum(kept['seconds'].values()) / 3600:.1f} hours." in text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert pictures and all((ROOT / "docs" / name).is_file() for name in pictures)
