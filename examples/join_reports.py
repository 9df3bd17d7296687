"""Put methods that were measured in several runs of `tve-hf evaluate`, on the same images, into one report.

    python examples/join_reports.py --output_dir joined report.json other/report.json \
        --rename other/report.json tve=tve_two_states --leave_out other/report.json random

The runs must have the same classifier and images, and the removal operators of the first, whose other settings are
kept. Intervals and tests are computed anew, over all methods.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tve_hf.benchmark.plots import draw
from tve_hf.evaluation.report import summarize, table_of
from tve_hf.files import dumps


def rows_of(report: dict[str, Any], removals: list[str]) -> dict[str, Any]:
    """Per-image columns, curves and costs of every method of a report, by its name."""
    keys = [f"{removal}/{side}" for removal in removals for side in ("plus", "minus")]
    methods = {}
    for spec, cost in report["cost"].items():
        columns = {key: report["per_image"][f"{spec}/{key}"] for key in keys}
        if f"{spec}/faithfulness" in report["per_image"]:
            columns["faithfulness"] = report["per_image"][f"{spec}/faithfulness"]
        curves = {removal: report["curves"][f"{removal}/{spec}"] for removal in removals}
        methods[spec] = {"cost": cost, "columns": columns, "curves": curves}
    return methods


def join(reports: list[dict[str, Any]], renames: list[dict[str, str]], left_out: list[set[str]]) -> dict[str, Any]:
    """One report of the methods of all; of a method that several have, the first.

    Raises:
        ValueError: If they are of other images or another classifier.
    """
    first = reports[0]
    removals = first["settings"]["removals"]
    methods: dict[str, Any] = {}
    for report, rename, missing in zip(reports, renames, left_out, strict=True):
        for name in ("classifier", "test_files"):
            if report["settings"][name] != first["settings"][name]:
                raise ValueError(f"The reports differ in {name}; join those of one classifier and the same images.")
        if report["rows"] != first["rows"]:
            raise ValueError("The reports are of other images; join those of the same.")
        if not set(removals) <= set(report["settings"]["removals"]):
            raise ValueError(
                f"A report lacks a removal operator of the first ({', '.join(removals)}); measure it too."
            )
        for spec, row in rows_of(report, removals).items():
            if spec not in missing:
                methods.setdefault(rename.get(spec, spec), row)
    if not all("faithfulness" in row["columns"] for row in methods.values()):  # a column with gaps compares nothing
        for row in methods.values():
            row["columns"].pop("faithfulness", None)
    own = {key: column for key, column in first["per_image"].items() if "/" not in key}
    per_image = own | {
        f"{spec}/{key}": column for spec, row in methods.items() for key, column in row["columns"].items()
    }
    table = {key: torch.tensor([float(v) for v in column], dtype=torch.float64) for key, column in per_image.items()}
    return first | {
        "settings": first["settings"] | {"methods": list(methods)},
        "summary": summarize(table, list(methods), removals),
        "refused": {},
        "cost": {spec: row["cost"] for spec, row in methods.items()},
        "curves": {
            f"{removal}/{spec}": row["curves"][removal] for removal in removals for spec, row in methods.items()
        },
        "per_image": per_image,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+")
    parser.add_argument("--rename", nargs="+", action="append", default=[], metavar="REPORT OLD=NEW")
    parser.add_argument("--leave_out", nargs="+", action="append", default=[], metavar="REPORT METHOD")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(arguments)
    renames = {path: dict(pair.split("=") for pair in pairs) for path, *pairs in args.rename}
    left_out = {path: set(names) for path, *names in args.leave_out}
    report = join(
        [json.loads(Path(path).read_text()) for path in args.reports],
        [renames.get(path, {}) for path in args.reports],
        [left_out.get(path, set()) for path in args.reports],
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.json").write_text(dumps(report, indent=1) + "\n")
    (args.output_dir / "table.md").write_text(table_of(report) + "\n")
    draw(report, args.output_dir)


if __name__ == "__main__":
    main()
