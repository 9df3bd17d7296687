"""Render model cards from config and results: every number in a card is read from a JSON file that a command wrote."""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..attribution import DEFAULT_RULES
from ..compatibility import quality_in_words
from ..evaluation.report import table_of
from ..patches import as_pair
from ..released import TAG

TEMPLATES = Path(__file__).parent / "templates"
# A picture in the checkpoint's folder, and the one in its place: that of the package's own explainer.
PICTURE = "example.png"
_CHELSEA = "https://raw.githubusercontent.com/tve-hf/tve_hf/main/docs/chelsea.png"
_ORIGIN = " Fine-tuned from `{classifier}`, {classifier_license}."


def table(rows: list[list[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that a card depends on.

    Raises:
        ValueError: If it does not exist.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a card needs it: run the command that measures it first.") from None


def report_file(path: Path) -> Path:
    """The report of an evaluation: a path of its own, or of the folder that `tve-hf evaluate` wrote."""
    return path / "report.json" if path.is_dir() else path


def task_of(path: Path) -> str:
    """The name of an evaluation's task: that of the folder it was written to."""
    return report_file(path).resolve().parent.name


# What a report says of an explainer itself, by the kind of its backgrounds: title, number and form.
_AGREEMENT = {
    "antithetical": [
        ("median Spearman with exact", "median_spearman", "{:.2f}"),
        ("relative error of kept", "mean_kept_error", "{:.2f}"),
        ("relative error of removed", "mean_removed_error", "{:.3f}"),
        ("mean error of Eq. 7, nats", "mean_error_nats", "{:.2f}"),
        ("median ε of Theorem 1", "median_epsilon", "{:.2f}"),
    ],
    "random": [
        ("median R² of the predicted class's logit", "median_r2", "{:.2f}"),
        ("median correlation with it", "median_faithfulness", "{:.2f}"),
    ],
}


def _agreement(config: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """Explainer against what it learnt: one column for each task."""
    rows = [["", *results], ["images", *(str(r["num_images"]) for r in results.values())]]
    rows.append(["rule", *(f"`{r.get('rule', r['settings']['rule'])}`" for r in results.values())])
    lines = _AGREEMENT[_backgrounds(config)]
    if all("accuracy" in r["summary"] for r in results.values()):  # not where labels are of other classes
        lines = [("classifier's accuracy", "accuracy", "{:.1%}"), *lines]
    for title, key, form in lines:
        rows.append([title, *(form.format(float(r["summary"][key])) for r in results.values())])
    return table(rows)


def _backgrounds(config: dict[str, Any]) -> str:
    return config.get("backgrounds", "antithetical")


def _fidelity(results: dict[str, dict[str, Any]]) -> str:
    """The table of each report, of every method under each removal operator, under the name of its task."""
    return "\n\n".join(f"### {task}\n\n{table_of(report)}" for task, report in results.items())


def _shares(results: dict[str, dict[str, Any]]) -> str:
    """How much of the exact maps' fidelity the explainer reaches, for each task and removal operator."""
    return "; ".join(
        f"on {task} "
        + ", ".join(f"{share:.0%} ({removal})" for removal, share in report["summary"]["tve_share_of_exact"].items())
        for task, report in results.items()
    )


def _shape_values(config: dict[str, Any]) -> dict[str, str]:
    """What every explainer's config says of it; one number of a size means a square."""
    return {
        "backbone": config["backbone_name"],
        "fingerprint": config["backbone_fingerprint"],
        "grid": " × ".join(map(str, as_pair(config["grid_size"]))),
        "image": " × ".join(map(str, as_pair(config["image_size"]))),
        "hops": str(config["hops"]),
        "embedding_dim": str(config["embedding_dim"]),
    }


def _explainer_values(folder: Path, config: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    arguments = read_json(folder / "training.json")["arguments"]
    return _trained_values(folder, config, results) | {
        "shares": _shares(results),
        "patches_per_image": str(arguments["patches_per_image"]),
    }


def _random_values(folder: Path, config: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Of an explainer of random backgrounds."""
    arguments, removals = read_json(folder / "training.json")["arguments"], config["label_removals"]
    return _trained_values(folder, config, results) | {
        "coalitions": config["coalitions"],
        "coalitions_per_image": str(arguments["coalitions_per_image"]),
        "removals": ", ".join(f"{removals.count(name)}/{len(removals)} {name}" for name in dict.fromkeys(removals)),
        "refine_coalitions": config["refine_coalitions"],
    }


def _trained_values(folder: Path, config: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Of every explainer that was measured."""
    training = read_json(folder / "training.json")
    arguments, last = training["arguments"], training["log"][-1]
    picture = (PICTURE, "of this explainer") if (folder / PICTURE).is_file() else (_CHELSEA, "of the one in tve_hf")
    return _shape_values(config) | {
        "picture": "![A photograph under its map, {1}]({0})".format(*picture),
        "agreement": _agreement(config, results),
        "fidelity": _fidelity(results),
        "data": ", ".join(f"`{source}`" for source in _sources(arguments)),
        "steps": str(last["step"]),
        "images_per_second": f"{last['images_per_second']:.1f}",
        "batch_size": str(arguments["batch_size"]),
        "learning_rate": f"{arguments['learning_rate']:g}",
        "num_epochs": str(arguments["num_epochs"]),
        "seed": str(arguments["seed"]),
    }


def _pretrained_values(folder: Path, config: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Of an explainer that has been measured by nothing but its own run."""
    training, quality = read_json(folder / "training.json"), config.get("quality")
    last, bad = training["log"][-1], training.get("bad_images", {"number": 0})
    whose = "sampled" if _backgrounds(config) == "random" else "exact"
    lines = {
        "median R² of the embeddings of fresh coalitions": "embedding_r2",
        "median R² of the predicted class's logit on them": "logit_r2",
        "median correlation with it": "logit_pearson",
        f"median Spearman with {whose} maps": "spearman",
        "relative error of kept": "kept_error",
        "relative error of removed": "removed_error",
        "median ε of Theorem 1": "epsilon",
        "Fidelity+ − Fidelity− AUC of its maps": "fidelity_gap",
        "the same of exact maps": "exact_fidelity_gap",
        "the same of sampled maps": "sampled_fidelity_gap",
    }
    measured = quality_in_words(quality)
    if quality:
        rows = [[title, f"{float(quality[key]):.3f}"] for title, key in lines.items() if key in quality]
        rule = config.get("rule") or DEFAULT_RULES[_backgrounds(config)]
        measured += f" At the end of its training, under the rule `{rule}`:\n\n{table([['', 'held-out'], *rows])}"
    arguments = training["arguments"].items()
    settings = {name: value for name, value in arguments if name != "output_dir" and value not in (None, [], False, 0)}
    return _shape_values(config) | {
        "steps": str(last["step"]),
        "measured": measured,
        "bad_images": str(bad["number"]),
        "settings": "\n".join(f"- `{name}`: `{value}`" for name, value in settings.items()),
    }


def _classifier_values(folder: Path, config: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    training = read_json(folder / "training.json")
    arguments, last = training["arguments"], (training.get("log") or [{}])[-1]
    settings = "\n".join(f"- `{name}`: `{value}`" for name, value in arguments.items())
    large, patch = last.get("large_test_accuracy"), config.get("patch_size")
    return {
        "architecture": config["model_type"],
        "patches": f" in patches of {patch} × {patch}" if patch else "",
        "large": f", and on {large:.1%} of {last['large_test_images']} larger photographs" if large else "",
        "origin": _ORIGIN.format(**arguments) if "classifier_license" in arguments else "",
        "accuracy": f"{training.get('test_accuracy') or last['test_accuracy']:.1%}",
        "classes": str(len(config["id2label"])),
        "image_size": str(config["image_size"]),
        "settings": settings,
    }


def _sources(arguments: dict[str, Any]) -> list[str]:
    """What was trained on, as the arguments of the command name it: a data set, files or patterns."""
    sources = arguments.get("dataset_name") or arguments.get("train_files") or []
    return [sources] if isinstance(sources, str) else sources


def _on_the_hub(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def _datasets(arguments: dict[str, Any], tasks: Iterable[str]) -> list[str]:
    """Names of the training data: repositories of the Hub, and folders that are called as one of the tasks."""
    names = []
    for source in _sources(arguments):
        parts = source.removeprefix("hf://datasets/").split("/")
        if source.startswith("hf://datasets/"):
            names.append("/".join(parts[:2]).partition("@")[0])
        elif len(parts) > 1 and parts[-2] in tasks:
            names.append(parts[-2])
        elif source == arguments.get("dataset_name") and _on_the_hub(source):
            names.append(source)
    return list(dict.fromkeys(names))


# The first metric of a card's metadata, by the kind of backgrounds: its type, name and value.
_AGREED: dict[str, Callable[[dict[str, Any]], tuple[str, str, float]]] = {
    "antithetical": lambda s: ("spearmanr", "median Spearman with exact", s["median_spearman"]),
    "random": lambda s: ("r2", "median R2 of the predicted class's logit under masking", s["median_r2"]),
}


def _metrics(config: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[EvalResult]:
    """Agreement with exact, and the fidelity of the maps under each removal operator, of each task."""
    metrics = []
    for task, report in results.items():
        summary = report["summary"]
        values = [_AGREED[_backgrounds(config)](summary)]
        for removal, rows in summary["fidelity"].items():
            name = f"Fidelity+ AUC less Fidelity- AUC, removed pixels: {removal}"
            values.append((f"fidelity_gap_{removal}", name, rows["tve"]["gap"][0]))
        metrics += [
            EvalResult("image-classification", task, task, metric, float(value), metric_name=name)
            for metric, name, value in values
        ]
    return [result for result in metrics if math.isfinite(result.metric_value)]


# How a checkpoint is described, by its model_type and whether there are results: template, values, tags for the Hub.
_KINDS: dict[str, tuple[str, Any, list[str]]] = {
    "tve": ("explainer.md", _explainer_values, [TAG, "explainability", "transferable-attribution"]),
    "tve random": ("random.md", _random_values, [TAG, "explainability", "transferable-attribution"]),
    "tve alone": ("pretrained.md", _pretrained_values, [TAG, "explainability", "transferable-attribution"]),
}
_CLASSIFIER = ("classifier.md", _classifier_values, [TAG])


def render_card(
    folder: Path, results: list[Path], repo_id: str | None = None, license: str | None = None
) -> ModelCard:
    """Render the card of a checkpoint.

    Args:
        folder: checkpoint with config.json and training.json.
        results: what `tve-hf evaluate` wrote, one folder or report.json for each task, whose name is the folder's.
        repo_id: name to load the checkpoint by in the card's code; that of the folder by default.
        license: of the weights, by its name on the Hub; only who releases them knows it, so the card names none by
            default.

    Raises:
        ValueError: If a file or a number is missing, or two reports are of tasks of one name.
    """
    config = read_json(folder / "config.json")
    kind = config["model_type"] if results else f"{config['model_type']} alone"
    if results and _backgrounds(config) == "random":
        kind = f"{kind} random"
    template, values_of, tags = _KINDS.get(kind, _CLASSIFIER)
    reports = {task_of(path): read_json(report_file(path)) for path in results}
    if len(reports) < len(results):
        raise ValueError(f"Two reports of one task among {', '.join(map(str, results))}; put them in other folders.")
    repo = repo_id or folder.name
    name = repo.rpartition("/")[2]
    backbone = config.get("backbone_name") or ""
    try:
        values = values_of(folder, config, reports) | {"name": name, "repo": repo}
        values["licence"] = f"`{license}`" if license else "none is named"
        data = ModelCardData(
            library_name="transformers",
            license=license,
            pipeline_tag="image-classification",
            base_model=backbone if _on_the_hub(backbone) else None,
            datasets=_datasets(read_json(folder / "training.json")["arguments"], reports) or None,
            tags=tags,
            model_name=name if reports else None,
            eval_results=_metrics(config, reports) if reports else None,
        )
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"The card of {folder} lacks a number ({error!r}): training.json or a report is incomplete; make it again."
        ) from error
    text = Template((TEMPLATES / template).read_text()).substitute(values)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
