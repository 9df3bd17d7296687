"""From per-image values of an evaluation to its summary and its table."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .statistics import bootstrap_interval, holm, kendall, sign_flip_test

_AGREEMENT: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "median_spearman": ("spearman", torch.nanmedian),
    "median_pearson": ("pearson", torch.nanmedian),
    "mean_kept_error": ("kept_error", torch.mean),
    "mean_removed_error": ("removed_error", torch.mean),
    "median_epsilon": ("epsilon", torch.median),
    "median_bound": ("bound", torch.median),
    "mean_error_nats": ("error", torch.mean),
    "median_r2": ("r2", torch.nanmedian),
    "median_faithfulness": ("faithfulness", torch.nanmedian),
    "accuracy": ("correct", torch.mean),
}


def summarize(table: dict[str, Tensor], specs: list[str], removals: list[str]) -> dict[str, Any]:
    """Reduce per-image values, (n,) each, to what a table and a model card report.

    For each removal operator and method: mean and standard deviation of both AUC and of their difference, the gap; the
    95 % paired bootstrap interval of its distance to the gap of `random` and of `tve`, and the p-value of a paired
    sign-flip test of it, Holm-corrected over the methods. The share of the gap of `exact` that `tve` has stands beside
    them, for each removal operator, and of each method the median faithfulness correlation.
    """
    summary: dict[str, Any] = {
        name: reduce(table[key]).item() for name, (key, reduce) in _AGREEMENT.items() if key in table
    }
    maps = {spec: table[f"{spec}/faithfulness"] for spec in specs if f"{spec}/faithfulness" in table}
    if maps:  # of each method's maps; a constant one foretells nothing
        summary["faithfulness"] = {spec: column.nan_to_num().median().item() for spec, column in maps.items()}
    summary["fidelity"] = {}
    shares: dict[str, float] = {}
    order: dict[str, list[float]] = {}
    for removal in removals:
        gaps = {spec: table[f"{spec}/{removal}/plus"] - table[f"{spec}/{removal}/minus"] for spec in specs}
        order[removal] = [gaps[spec].mean().item() for spec in specs]
        rows: dict[str, Any] = {}
        for spec in specs:
            columns = {"plus_auc": table[f"{spec}/{removal}/plus"], "minus_auc": table[f"{spec}/{removal}/minus"]}
            rows[spec] = {
                name: [column.mean().item(), column.std(correction=min(1, len(column) - 1)).item()]
                for name, column in (columns | {"gap": gaps[spec]}).items()
            }
        for other in ("random", "tve"):
            if other not in gaps:
                continue
            rivals = [spec for spec in specs if spec != other]
            p_values = holm([sign_flip_test(gaps[spec] - gaps[other]) for spec in rivals])
            for spec, p_value in zip(rivals, p_values, strict=True):
                rows[spec][f"gap_above_{other}"] = list(bootstrap_interval(gaps[spec] - gaps[other]))
                rows[spec][f"p_{other}"] = p_value
        if "tve" in gaps and "exact" in gaps:
            shares[removal] = gaps["tve"].mean().item() / gaps["exact"].mean().item()
        summary["fidelity"][removal] = rows
    if shares:
        summary["tve_share_of_exact"] = shares
    if len(removals) > 1 and len(specs) > 1:
        summary["rank_agreement"] = {
            f"{one}/{other}": kendall(order[one], order[other])
            for i, one in enumerate(removals)
            for other in removals[i + 1 :]
        }
    return rounded(summary)


def rounded(value: Any) -> Any:
    """Round the floats in nested dicts and lists to four decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def _interval(row: dict[str, Any], other: str) -> str:
    if f"gap_above_{other}" not in row:
        return ""
    low, high = row[f"gap_above_{other}"]
    return f"{low:+.3f} to {high:+.3f} (p {row[f'p_{other}']:.2g})"


def table_of(report: dict[str, Any]) -> str:
    """The report as a Markdown table: one block for each removal operator, the best difference first."""
    lines = [
        f"{report['num_images']} images. Fidelity-sparsity AUC, mean ± standard deviation over images; difference is "
        "Fidelity+ less Fidelity−. Intervals: 95 % paired bootstrap; p: paired sign-flip test, Holm-corrected. Cost "
        "for each image: seconds in this run, and passes of the classifier, forward + backward"
        + (
            " + what an explainer computes itself."
            if any(cost.get("explainer") for cost in report["cost"].values())
            else "."
        ),
    ]
    correlations = report["summary"].get("faithfulness", {})
    if correlations:
        lines[0] += (
            " Faithfulness: correlation of the sum of the scores in a random set of patches with the class's logit "
            "when that set alone is visible, median over images."
        )
    column = " faithfulness ↑ |" if correlations else ""
    for removal, rows in report["summary"]["fidelity"].items():
        lines += [
            f"\n**Removed pixels: {removal}**\n",
            f"| method | Fidelity+ ↑ | Fidelity− ↓ | difference ↑ | above random | above tve |{column} seconds "
            "| passes |",
            f"| --- | --- | --- | --- | --- | --- |{' --- |' if column else ''} --- | --- |",
        ]
        for spec, row in sorted(rows.items(), key=lambda item: -item[1]["gap"][0]):
            cells = [f"{mean:.3f} ± {sd:.3f}" for mean, sd in (row["plus_auc"], row["minus_auc"], row["gap"])]
            cost = report["cost"][spec]
            passes = f"{cost['forward']:.4g} + {cost['backward']:.4g}"
            if cost.get("explainer"):
                passes += f" + {cost['explainer']:.2g}"
            cells += [_interval(row, "random"), _interval(row, "tve")]
            cells += [f"{correlations[spec]:.3f}" if spec in correlations else ""] if correlations else []
            cells += [f"{cost['seconds']:.3g}", passes]
            lines.append(f"| {spec} | " + " | ".join(cells) + " |")
    if report.get("refused"):
        lines.append("\nNot for this classifier:\n")
        lines += [f"- {spec}: {reason}" for spec, reason in report["refused"].items()]
    return "\n".join(lines)
