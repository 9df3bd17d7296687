"""Write a page of results from what the recipes left: tables beside the published numbers, and what they say.

    python examples/reproduce/report.py --data data --models models --page docs/results.md

A recipe names its tables: of what kind of file each is, what its rows and columns are repeated for, and the published
numbers. Its findings are sentences that were written once the numbers were there: one with a decimal number that is in
no table of the study is refused. The cells are kept as JSON beside the page. Of a study that is not done the page has
what there is, and says so last.
"""

import argparse
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import run as recipes

from tve_hf.files import dumps, write_whole

Cells = dict[str, dict[str, str]]  # row -> column -> cell


def accuracy(found: dict[str, Any]) -> dict[str, str]:
    """Of `eval_results.json`."""
    return {"": f"{100 * found['eval_accuracy']:.1f} %"}


def fidelity(found: dict[str, Any], removal: str) -> dict[str, str]:
    """Both areas, Fidelity+ / Fidelity−, of every method of a `report.json` of `tve-hf evaluate`, the best first."""
    rows = found["summary"]["fidelity"][removal]
    best_first = sorted(rows, key=lambda spec: -rows[spec]["gap"][0])
    return {spec: f"{rows[spec]['plus_auc'][0]:.2f} / {rows[spec]['minus_auc'][0]:.2f}" for spec in best_first}


def gap(found: dict[str, Any], removal: str) -> dict[str, str]:
    """Fidelity+ less Fidelity− of every method, and the 95 % interval of how far it is above `tve`."""
    cells = {}
    rows = found["summary"]["fidelity"][removal]
    for spec in sorted(rows, key=lambda spec: -rows[spec]["gap"][0]):
        above = rows[spec].get("gap_above_tve")
        cells[spec] = f"{rows[spec]['gap'][0]:.3f}" + (f" ({above[0]:+.3f} to {above[1]:+.3f})" if above else "")
    return cells


def ratio(found: dict[str, Any]) -> dict[str, str]:
    """Of `speed.json` of `tve-hf bench`, one classifier and batch: time beside the prediction's, with its interval."""
    (entry,) = found["measured"]
    cells = {}
    for row in entry["rows"]:
        low, high = row["interval"]
        cells[row["name"]] = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
    return cells


def passes(found: dict[str, Any]) -> dict[str, str]:
    """Of `passes.json`: the gap of each form and number of masked passes, under both removal operators."""
    cells = {}
    for row in found["rows"]:
        gaps = [
            "{:.3f} ({:.3f} to {:.3f})".format(row[removal]["gap"], *row[removal]["interval"])
            for removal in ("zero", "blur")
        ]
        cells[f"{row['backgrounds']}, {row['passes']:,} passes"] = " / ".join(gaps)
    return cells


def loss(found: dict[str, Any]) -> dict[str, str]:
    """Of `training.json`: the first and the last loss of its log, means over as many steps as a row has."""
    rows = [row["loss"] for row in found["log"] if "loss" in row]
    return {"first": f"{rows[0]:.3f}", "last": f"{rows[-1]:.3f}"}


def estimates(found: dict[str, Any], at: list[str]) -> dict[str, str]:
    """Of a summary of values with their 95 % intervals, [value, low, high]: the entries under these keys."""
    entries = found["summary"]
    for key in at:
        entries = entries[key]
    cells = {}
    for name, row in entries.items():
        value, low, high = map(float, row)  # "nan" where there was nothing to say it of
        interval = "" if isnan(low) or isnan(high) else f" ({low:.3f} to {high:.3f})"
        cells[name] = "" if isnan(value) else f"{value:.3f}{interval}"
    return cells


def perturbation(found: dict[str, Any], explained: str) -> dict[str, str]:
    """Both areas in per cent, negative / positive, of every row of a `report.json` of `study_perturbation.py`.

    Before them the accuracy with nothing deleted; in brackets 95 % intervals of how far areas are above the
    reference's. `explained` is the class that maps are of.
    """
    cells = {"accuracy of the whole images": f"{100 * found['accuracy']:.1f}"}
    for name, row in found["summary"][explained].items():
        orders = row["negative"], row["positive"]
        cells[name] = " / ".join(f"{100 * order['mean']:.1f}" for order in orders)
        if above := [order["above_interval"] for order in orders if "above_interval" in order]:
            cells[name] += f" ({' / '.join(f'{100 * low:+.1f} to {100 * high:+.1f}' for low, high in above)})"
    return cells


def segmentation(found: dict[str, Any]) -> dict[str, str]:
    """Pixel accuracy / mIoU / mAP in per cent of every method of a file of `segmentation.py`."""
    cells = {}
    for spec, row in found["methods"].items():
        values = row["pixel_accuracy"]["mean"], row["mean_iou"], row["average_precision"]["mean"]
        cells[spec] = " / ".join(f"{100 * value:.1f}" for value in values)
    return cells


BOUNDS = {"theorem": "Theorem 1", "spread": "spread", "prob": "probabilities", "logit": "logits"}


def theorem(found: dict[str, Any], of: str | None = None) -> dict[str, str]:
    """Of `report.json` of `study_theorem_random.py`, or of the file that `study_theorem.py` writes beside its picture.

    Args:
        of: "halves", for those in place of the explainer.
    """
    counts = found["summary"] if of is None else found["summary"][of]
    cells = {
        "ε < 1": "{with_bound} of {images} images, {within_bound} within the bound".format(**counts),
        "median ε": f"{counts['median_epsilon']:.2f}",
        "median error, nats": f"{counts['median_error_nats']:.3f}",
    }
    for name in [name for name in BOUNDS if name in counts]:
        medians = " / ".join(f"{float(counts[name][f'median_{part}']):.4f}" for part in ("error", "bound", "size"))
        cells[BOUNDS[name]] = f"{medians}, {counts[name]['below_size']}"
    for rule, share in counts.get("sampling_share", {}).items():
        cells[f"share of sampling, {rule}"] = f"{100 * share:.0f} %"
    return cells


KINDS: dict[str, Callable[..., dict[str, str]]] = {
    "accuracy": accuracy,
    "estimates": estimates,
    "fidelity": fidelity,
    "gap": gap,
    "loss": loss,
    "passes": passes,
    "ratio": ratio,
    "perturbation": perturbation,
    "segmentation": segmentation,
    "theorem": theorem,
}


def cells_of(table: dict[str, Any], places: dict[str, str]) -> Cells:
    """What a table shows; files that are not there leave their cells empty.

    Args:
        table: of a recipe: `kind`, a key of `KINDS`, and its `options`; `rows` and `columns`, names of things in
            `common.yaml`; `reads`, the file of a row and a column, or several by name, each with rows of its own.
        places: as for `run.steps_of`.
    """
    common = yaml.safe_load((recipes.HERE / "common.yaml").read_text())
    axes = [*table["rows"], *table["columns"]]
    reads = table["reads"] if isinstance(table["reads"], dict) else {"": table["reads"]}
    cells: Cells = {}
    for names in itertools.product(*(common[axis] for axis in axes)):
        row, column = names[: len(table["rows"])], " ".join(names[len(table["rows"]) :])
        for label, pattern in reads.items():
            path = Path(pattern.format(**places, **dict(zip(axes, names, strict=True))))
            if not path.is_file():
                continue
            found = KINDS[table["kind"]](json.loads(path.read_text()), **table.get("options", {}))
            for part, cell in found.items():
                cells.setdefault(", ".join(filter(None, (*row, label, part))), {})[column] = cell
    return cells


def markdown(columns: list[str], rows: dict[str, list[Any]]) -> str:
    """A table, of which each row starts with its name."""
    lines = [["", *columns], ["---"] * (1 + len(columns)), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def pictures_of(name: str, figure: dict[str, Any], places: dict[str, str], folder: str) -> dict[str, Path]:
    """The pictures of a figure by their places beside the page; files that are not there are left out.

    Args:
        name: of the recipe.
        figure: of it: `caption`; `for`, as in steps; and `reads`, the file of each.
        places: as for `run.steps_of`.
        folder: of the page's pictures.
    """
    common = yaml.safe_load((recipes.HERE / "common.yaml").read_text())
    found = {}
    for names in itertools.product(*(common[axis] for axis in figure["for"])):
        path = Path(figure["reads"].format(**places, **dict(zip(figure["for"], names, strict=True))))
        if path.is_file():
            found[f"{folder}/{'-'.join([name, *names, path.name]).replace(' ', '-')}"] = path
    return found


def section(recipe: dict[str, Any], tables: list[Cells], pictures: list[dict[str, Path]]) -> str:
    """A study's part of the page.

    Args:
        pictures: of each figure, as `pictures_of` gives them.

    Raises:
        ValueError: If a finding has a number that is in none of its tables.
    """
    head, parts = [f"## {recipe['title']}", recipe["question"]], []
    for table, cells in zip(recipe["tables"], tables, strict=True):
        if not cells:
            continue
        columns = list(dict.fromkeys(column for row in cells.values() for column in row))
        rows = {name: [row.get(column, "") for column in columns] for name, row in cells.items()}
        parts += [table["caption"], markdown(columns, rows)]
        if published := table.get("published"):
            parts += [published["caption"], markdown(published["columns"], published["rows"])]
    for figure, names in zip(recipe.get("figures", []), pictures, strict=True):
        parts += [figure["caption"], *(f"![{Path(name).stem}]({name})" for name in names)]
    shown = set(re.findall(r"\d+\.\d+", "\n".join(parts)))
    findings = recipe.get("findings", [])
    for finding in findings:
        if strange := [number for number in re.findall(r"\d+\.\d+", finding) if number not in shown]:
            raise ValueError(f"{recipe['title']}: {strange[0]} is in none of its tables, but in: {finding}")
    return "\n\n".join([*head, *["\n".join(f"* {finding}" for finding in findings)] * bool(findings), *parts])


def page_of(places: dict[str, str], folder: str) -> tuple[str, dict[str, list[Cells]], dict[str, Path]]:
    """The page, the cells of every study that is done, and its pictures by their places beside the page.

    Args:
        folder: beside the page, of its pictures.
    """
    kept: dict[str, list[Cells]] = {}
    copied: dict[str, Path] = {}
    sections, open_studies = [], []
    for recipe, name in sorted(
        ((recipes.read(name), name) for name in recipes.RECIPES), key=lambda pair: pair[0]["number"]
    ):
        steps = recipes.steps_of(recipe, places)
        left = [step for step in steps if not step.done]
        open_studies += [f"* {recipe['title']}: {len(left)} of {len(steps)} steps are left."] * bool(left)
        tables = [cells_of(table, places) for table in recipe["tables"]]
        if not any(tables):
            continue
        kept[name] = tables
        pictures = [pictures_of(name, figure, places, folder) for figure in recipe.get("figures", [])]
        for own in pictures:
            copied |= own
        sections.append(section(recipe, kept[name], pictures))
    hours = recipes.spent(Path(places["out"])) / 3600
    head = (
        "# Results\n\nThe studies of the papers in miniature, written by `examples/reproduce/report.py` from what the "
        f"recipes beside it left. They took {hours:.1f} hours."
    )
    rest = ["## Not done\n\n" + "\n".join(open_studies)] * bool(open_studies)
    return "\n\n".join([head, *sections, *rest]) + "\n", kept, copied


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as for run.py, like those below")
    parser.add_argument("--models", required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--page", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args(arguments)
    try:
        places = {"data": args.data, "models": args.models, "out": str(args.output_dir)}
        page, kept, pictures = page_of(places, args.page.stem)
    except ValueError as error:
        sys.exit(str(error))
    for name, source in pictures.items():
        (args.page.parent / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.page.parent / name, partial(shutil.copyfile, source))
    args.page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.page, lambda path: path.write_text(page))
    write_whole(args.page.with_suffix(".json"), lambda path: path.write_text(dumps(kept, indent=1) + "\n"))


if __name__ == "__main__":
    main()
