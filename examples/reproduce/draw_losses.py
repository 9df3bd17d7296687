"""Draw the losses of trainings against their steps, from what `tve-hf pretrain` logs.

python examples/reproduce/draw_losses.py "from scratch=runs/a/training.json" "tuned=runs/b/training.json" \
    --output_file losses.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# A line each, told apart without colour too.
STYLES = [{"color": "black"}, {"color": "#0072b2", "linestyle": "--"}, {"color": "#d55e00", "linestyle": ":"}]


def losses_of(training: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Steps of a log and the mean loss of the steps up to each from the one before."""
    rows = [row for row in training["log"] if "loss" in row]
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainings", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--output_file", required=True, type=Path)
    args = parser.parse_args(arguments)
    if len(args.trainings) > len(STYLES):
        parser.error(f"{len(args.trainings)} trainings are more than {len(STYLES)} lines; draw fewer.")
    figure = Figure(figsize=(5.5, 3.5))
    axis = figure.subplots()
    for training, style in zip(args.trainings, STYLES, strict=False):
        name, equals, path = training.partition("=")
        if not equals:
            parser.error(f"{training} has no name; write NAME=FILE.")
        axis.plot(*losses_of(json.loads(Path(path).read_text())), label=name, **style)
    axis.set(xlabel="step", ylabel="loss")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(args.output_file, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
