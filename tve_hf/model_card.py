"""Render model cards from config and results: every number in a card is read from a JSON file that a command wrote."""

import json
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .patches import as_pair

TEMPLATES = Path(__file__).parent / "templates"


def _table(rows: list[list[str]]) -> str:
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


def _agreement(results: dict[str, dict[str, Any]]) -> str:
    """Explainer against exact: one column for each task."""
    lines = {
        "classifier's accuracy": ("accuracy", "{:.1%}"),
        "median Spearman with exact": ("median_spearman", "{:.2f}"),
        "relative error of kept": ("mean_kept_error", "{:.2f}"),
        "relative error of removed": ("mean_removed_error", "{:.3f}"),
        "mean error of Eq. 7, nats": ("mean_error_nats", "{:.2f}"),
        "median ε of Theorem 1": ("median_epsilon", "{:.2f}"),
    }
    rows = [["", *results], ["images", *(str(r["num_images"]) for r in results.values())]]
    for title, (key, form) in lines.items():
        rows.append([title, *(form.format(r["summary"][key]) for r in results.values())])
    return _table(rows)


def _fidelity(results: dict[str, dict[str, Any]]) -> str:
    """Fidelity of each method under each removal operator: mean ± standard deviation over images."""
    rows = [["task", "removed pixels", "method", "Fidelity+ AUC ↑", "Fidelity− AUC ↓", "difference ↑", "above random"]]
    for task, result in results.items():
        for removal, methods in result["summary"]["fidelity"].items():
            for name, found in methods.items():
                if not isinstance(found, dict):
                    continue
                cells = [
                    f"{mean:.3f} ± {sd:.3f}" for mean, sd in (found["plus_auc"], found["minus_auc"], found["gap"])
                ]
                low, high = found.get("gap_above_random", (0, 0))
                above = "" if name == "random" else f"{low:.3f} to {high:.3f}"
                rows.append([task, removal, name, *cells, above])
    return _table(rows)


def _explainer_values(folder: Path, config: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    if not results:
        raise ValueError(
            f"The card of {folder} needs measured results; run `tve-hf evaluate` and pass its reports as --results."
        )
    training = read_json(folder / "training.json")
    arguments, last = training["arguments"], training["log"][-1]
    first = next(iter(results.values()))
    shares = [
        f"{result['summary']['fidelity']['zero']['tve_share_of_exact']:.0%} on {task}"
        for task, result in results.items()
    ]
    return {
        "backbone": config["backbone_name"],
        "fingerprint": config["backbone_fingerprint"],
        "grid": " × ".join(str(side) for side in as_pair(config["grid_size"])),
        "image": " × ".join(str(side) for side in config["image_size"]),
        "hops": str(config["hops"]),
        "embedding_dim": str(config["embedding_dim"]),
        "rule": first["settings"]["rule"],
        "agreement": _agreement(results),
        "fidelity": _fidelity(results),
        "shares": " and ".join(shares),
        "train_files": ", ".join(arguments["train_files"]),
        "steps": str(last["step"]),
        "batch_size": str(arguments["batch_size"]),
        "patches_per_image": str(arguments["patches_per_image"]),
        "learning_rate": f"{arguments['learning_rate']:g}",
        "num_epochs": str(arguments["num_epochs"]),
        "seed": str(arguments["seed"]),
    }


def _pretrained_values(folder: Path, config: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Of an explainer that has been measured by nothing but its own run."""
    training = read_json(folder / "training.json")
    last, bad = training["log"][-1], training.get("bad_images", {"number": 0})
    lines = {
        "median Spearman with exact": "spearman",
        "relative error of kept": "kept_error",
        "relative error of removed": "removed_error",
        "median ε of Theorem 1": "epsilon",
        "Fidelity+ − Fidelity− AUC of its maps": "fidelity_gap",
        "the same of exact maps": "exact_fidelity_gap",
    }
    measured = [[title, f"{float(last[key]):.3f}"] for title, key in lines.items() if key in last]
    side = config["grid_size"]
    rows, columns = side if isinstance(side, list) else (side, side)
    given = training["arguments"].items()
    told = {name: value for name, value in given if name != "output_dir" and value not in (None, [], False, 0)}
    return {
        "backbone": config["backbone_name"],
        "fingerprint": config["backbone_fingerprint"],
        "grid": f"{rows} × {columns}",
        "image": " × ".join(str(side) for side in config["image_size"]),
        "hops": str(config["hops"]),
        "embedding_dim": str(config["embedding_dim"]),
        "steps": str(last["step"]),
        "measured": _table([["held-out images", ""], *measured]) if measured else "It was not measured.",
        "bad_images": str(bad["number"]),
        "settings": "\n".join(f"- `{name}`: `{value}`" for name, value in told.items()),
    }


def _classifier_values(folder: Path, config: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, str]:
    training = read_json(folder / "training.json")
    accuracy = training["test_accuracy"] if "test_accuracy" in training else training["log"][-1]["test_accuracy"]
    settings = "\n".join(f"- `{name}`: `{value}`" for name, value in training["arguments"].items())
    return {
        "accuracy": f"{accuracy:.1%}",
        "classes": str(len(config["id2label"])),
        "image_size": str(config["image_size"]),
        "patch_size": str(config["patch_size"]),
        "settings": settings,
    }


# How a checkpoint is described, by its model_type and whether there are results: template, values, Hub metadata.
_KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "tve": (
        "explainer.md",
        _explainer_values,
        {"pipeline_tag": "image-classification", "tags": ["tve_hf", "explainability"]},
    ),
    "tve alone": (
        "pretrained.md",
        _pretrained_values,
        {"pipeline_tag": "image-classification", "tags": ["tve_hf", "explainability"], "license": None},
    ),
}
_CLASSIFIER = ("classifier.md", _classifier_values, {"pipeline_tag": "image-classification", "tags": ["tve_hf"]})


def render_card(folder: Path, results: list[Path]) -> ModelCard:
    """Render the card of a checkpoint.

    Args:
        folder: checkpoint with config.json and training.json.
        results: reports of `tve-hf evaluate`, one for each task, named <task>.json.

    Raises:
        ValueError: If a file or a number is missing.
    """
    config = read_json(folder / "config.json")
    kind = config["model_type"] if results else f"{config['model_type']} alone"
    template, values_of, metadata = _KINDS.get(kind, _CLASSIFIER)
    reports = {path.stem: read_json(path) for path in results}
    try:
        values = values_of(folder, config, reports) | {"name": folder.name}
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"The card of {folder} lacks a number ({error!r}): training.json or a report is incomplete; make it again."
        ) from error
    text = Template((TEMPLATES / template).read_text()).substitute(values)
    data = ModelCardData(**({"license": "cc-by-nc-4.0", "library_name": "transformers"} | metadata))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
