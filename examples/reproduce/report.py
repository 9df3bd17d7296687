"""Write a page of results from what the recipes left: tables beside the published numbers, and what they say.

    python examples/reproduce/report.py --data data --models models --page docs/results.md

A recipe names its tables: of what kind of file each is, what its rows and columns are repeated for, and the published
numbers. Its findings are sentences that were written once the numbers were there: one with a decimal number that is in
no table of the study is refused. The cells are kept as JSON beside the page. Studies that are not done are named last.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable
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
    "fidelity": fidelity,
    "gap": gap,
    "ratio": ratio,
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


def section(recipe: dict[str, Any], tables: list[Cells]) -> str:
    """A study's part of the page.

    Raises:
        ValueError: If a finding has a number that is in none of its tables.
    """
    parts = [f"## {recipe['title']}", recipe["question"]]
    for table, cells in zip(recipe["tables"], tables, strict=True):
        columns = list(dict.fromkeys(column for row in cells.values() for column in row))
        rows = {name: [row.get(column, "") for column in columns] for name, row in cells.items()}
        parts += [table["caption"], markdown(columns, rows)]
        if published := table.get("published"):
            parts += [published["caption"], markdown(published["columns"], published["rows"])]
    shown = set(re.findall(r"\d+\.\d+", "\n".join(parts)))
    findings = recipe.get("findings", [])
    for finding in findings:
        if strange := [number for number in re.findall(r"\d+\.\d+", finding) if number not in shown]:
            raise ValueError(f"{recipe['title']}: {strange[0]} is in none of its tables, but in: {finding}")
    return "\n\n".join(parts + ["\n".join(f"* {finding}" for finding in findings)] * bool(findings))


def page_of(places: dict[str, str]) -> tuple[str, dict[str, list[Cells]]]:
    """The page, and the cells of every study that is done."""
    kept: dict[str, list[Cells]] = {}
    sections, open_studies = [], []
    for name in recipes.RECIPES:
        recipe = recipes.read(name)
        left = [step for step in recipes.steps_of(recipe, places) if not step.done]
        if left or "tables" not in recipe:
            open_studies += [f"* {recipe['title']}: {len(left)} steps are left."] * bool(left)
            continue
        kept[name] = [cells_of(table, places) for table in recipe["tables"]]
        sections.append(section(recipe, kept[name]))
    ledger = Path(places["out"]) / "compute.json"
    hours = sum(json.loads(ledger.read_text()).values()) / 3600 if ledger.is_file() else 0.0
    head = (
        "# Results\n\nThe studies of the papers in miniature, written by `examples/reproduce/report.py` from what the "
        f"recipes beside it left. They took {hours:.1f} hours."
    )
    rest = ["## Not done\n\n" + "\n".join(open_studies)] * bool(open_studies)
    return "\n\n".join([head, *sections, *rest]) + "\n", kept


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as for run.py, like those below")
    parser.add_argument("--models", required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--page", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args(arguments)
    try:
        page, kept = page_of({"data": args.data, "models": args.models, "out": str(args.output_dir)})
    except ValueError as error:
        sys.exit(str(error))
    write_whole(args.page, lambda path: path.write_text(page))
    write_whole(args.page.with_suffix(".json"), lambda path: path.write_text(dumps(kept, indent=1) + "\n"))


if __name__ == "__main__":
    main()
