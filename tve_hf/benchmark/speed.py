"""What predictions and explanations cost beside each other: time, operations and memory of the same batch, in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from .. import methods
from ..attribution import rule_of
from ..classifiers import SplitClassifier
from ..evaluation.statistics import bootstrap_interval
from ..files import dumps, write_whole
from ..folding import explain_pass
from ..modeling_tve import TVEExplainer
from .cost import LiveMemory, wait_for_device
from .judge import parse_method

# What all others are compared with.
PREDICTION = "prediction"
# Methods under names of their own, and those options that make them so.
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "legrad_last_2": ("legrad", {"layers": (-2, -1)}),
    "ig@50": ("ig", {"n_steps": 50}),
}
# Samples that are measured where a method takes more: its time and operations are scaled up from these.
MOST_SAMPLES = 20


@dataclass(frozen=True)
class Action:
    """Something to measure.

    Args:
        run: does it once, given pixel_values (B, 3, H, W).
        models: whose weights it needs.
        scale: how many times as much the whole method does.
    """

    run: Callable[[Tensor], Any]
    models: Sequence[nn.Module]
    scale: float = 1.0


def prediction(classifier: SplitClassifier) -> Action:
    """The classifier's plain pass, of which nothing is kept but the logits."""
    model = classifier.backbone.model

    @torch.no_grad()
    def run(pixel_values: Tensor) -> Any:
        return model(pixel_values)

    return Action(run, [model])


def by_explainer(classifier: SplitClassifier, explainer: TVEExplainer, rule: str | None = None) -> Action:
    """A prediction and the map of its class by an explainer, as the pipeline makes them."""
    reading, rule = classifier.reading(tuple(explainer.config.feature_names)), rule or rule_of(explainer.config)

    @torch.no_grad()
    def run(pixel_values: Tensor) -> Tensor:
        seen = reading(pixel_values)
        return explain_pass(explainer, reading, pixel_values, seen, seen.logits.argmax(-1), rule)

    return Action(run, [classifier.backbone.model, explainer])


def by_method(classifier: SplitClassifier, spec: str, grid: tuple[int, int], class_idx: Tensor) -> Action:
    """The map of a class that is known already, so that what a method predicts on its way costs nothing more.

    Args:
        spec: of `NAMED`, or a method as `name` or `name@samples`; those of more than `MOST_SAMPLES` are scaled.
        class_idx: the class of each image, (B,).

    Raises:
        ValueError: If there is no such method, or it draws no samples.
    """
    name, options = NAMED[spec] if spec in NAMED else parse_method(spec)
    defaults, scale = methods.options_of(name), 1.0
    for option in {"n_samples", "n_steps"} & defaults.keys():
        samples = options.get(option, defaults[option])
        scale = max(1.0, samples / MOST_SAMPLES)
        options = options | {option: min(samples, MOST_SAMPLES)}

    def run(pixel_values: Tensor) -> Tensor:
        return methods.explain(name, classifier, pixel_values, class_idx, grid, **options)

    return Action(run, [classifier.backbone.model], scale)


def measure(actions: dict[str, Action], pixel_values: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Measure actions on one batch, turn by turn, so that a busy moment of the machine hits all alike.

    One round of all, which counts operations and memory, warms up. Every other round goes backwards. A ratio is that
    of an action's time to the prediction's in the same round.

    Args:
        actions: by name; `PREDICTION` is one of them.
        repeats: rounds that count, at least 2.

    Returns:
        For each action its `name`, `seconds` and `ratio` (medians over the rounds), the 95 % bootstrap `interval` of
        the ratio's median, `gflops` of an image, `memory_mb`, weights and the most bytes of live tensors, `scale`, and
        `all_seconds` of every round.
    """
    counted = {name: _count(action, pixel_values) for name, action in actions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in tqdm(range(repeats), unit="round", desc=f"batch of {len(pixel_values)}"):
        for name in list(actions) if number % 2 == 0 else reversed(actions):
            wait_for_device()
            start = perf_counter()
            actions[name].run(pixel_values)
            wait_for_device()
            seconds[name].append((perf_counter() - start) * actions[name].scale)
    plain = torch.tensor(seconds[PREDICTION], dtype=torch.float64)
    rows = []
    for name, action in actions.items():
        own = torch.tensor(seconds[name], dtype=torch.float64)
        ratios = own / plain
        operations, memory = counted[name]
        rows.append(
            {
                "name": name,
                "seconds": own.median().item(),
                "ratio": ratios.median().item(),
                "interval": bootstrap_interval(ratios, statistic=lambda rows: rows.median(1).values),
                "gflops": operations * action.scale / len(pixel_values) / 1e9,
                "memory_mb": memory / 2**20,
                "scale": action.scale,
                "all_seconds": own.tolist(),
            }
        )
    return rows


def _count(action: Action, pixel_values: Tensor) -> tuple[int, int]:
    """Floating-point operations of an action, and bytes: its weights', and the most that its tensors take at once."""
    action.run(pixel_values)  # what is made once and kept does not count
    with FlopCounterMode(display=False) as operations:
        action.run(pixel_values)
    with LiveMemory() as memory:
        action.run(pixel_values)
    weights = {weight.data_ptr(): weight.nbytes for model in action.models for weight in model.parameters()}
    return operations.get_total_flops(), memory.peak + sum(weights.values())


def table_of(report: dict[str, Any]) -> str:
    """A report as Markdown: a table for each classifier and batch size."""
    lines = []
    for entry in report["measured"]:
        lines += [
            f"**{entry['classifier']}**, batch of {entry['batch_size']}, {report['device']}, {report['dtype']}",
            "",
            "| | ms an image | ratio to the prediction | 95 % interval | GFLOP an image | memory, MB |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in entry["rows"]:
            low, high = row["interval"]
            star = "" if row["scale"] == 1 else " *"
            each = 1000 * row["seconds"] / entry["batch_size"]
            lines.append(
                f"| {row['name']}{star} | {each:.2f} | {row['ratio']:.3f} | {low:.3f} to {high:.3f} | "
                f"{row['gflops']:.2f} | {row['memory_mb']:.0f} |"
            )
        lines += [f"| {name} | refused: {reason} | | | | |" for name, reason in entry["refused"].items()]
        lines.append("")
    if any(row["scale"] != 1 for entry in report["measured"] for row in entry["rows"]):
        lines.append(f"\\* measured on {MOST_SAMPLES} samples, and scaled up.")
    return "\n".join(lines).rstrip()


def write(report: dict[str, Any], folder: Path) -> None:
    """Write speed.json, speed.md and speed.png, each whole or not at all."""
    from .plots import speed

    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "speed.json", lambda path: path.write_text(dumps(report, indent=1) + "\n"))
    write_whole(folder / "speed.md", lambda path: path.write_text(table_of(report) + "\n"))
    write_whole(folder / "speed.png", lambda path: speed(report, path))
