"""Figures as vector graphics, for papers: laid out by matplotlib, with text as text and pictures as pixels."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_whole
from .drawing import Explanation, parts_of
from .sheet import PANEL, SIDES, Parts, across, score_range, ticks, with_photograph

_DPI = 300  # what journals ask of photographs
_SIZE, _LINE = 6, 32  # points of text, and characters of a line above a picture
_GAP, _LEGEND = 0.15, 0.85  # inches
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # which matplotlib brings
    "pdf.fonttype": 42,  # TrueType, which journals take and editors can edit
    "svg.fonttype": "none",  # text, not outlines
    "svg.hashsalt": "tve_hf",  # the same file each time
    "text.parse_math": False,  # a class may have a "$" in its name
    "text.usetex": False,
}


def savefig(explanations: Explanation | Sequence[Explanation], path: str | os.PathLike) -> None:
    """Save `figure` as PDF or SVG: text stays text, photograph and maps are pixels at 300 to the inch.

    Args:
        explanations: of one class, or of several of one photograph, as for `figure`.
        path: ends in .pdf or .svg. The file is whole, or as it was if this fails.

    Raises:
        ValueError: if the path has another ending, or as `figure`.
        ImportError: without matplotlib.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".pdf", ".svg"):
        raise ValueError(f'{path} ends in neither .pdf nor .svg; for pixels, save explanation["figure"].')
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder; make it first, or save {path.name} elsewhere.")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("PDF and SVG figures need matplotlib: `pip install matplotlib`.") from None
    with rc_context(_STYLE):
        page = Figure(layout="constrained")
        _lay_out(page, parts_of(explanations))
        facts = dict.fromkeys(["Date"] if ending == ".svg" else ["CreationDate"])  # none: the same file each time
        write_whole(path, lambda file: page.savefig(file, format=ending[1:], dpi=_DPI, metadata=facts))


def _lay_out(page: Any, parts: Parts) -> None:
    """Put on a figure of matplotlib what `sheet` draws."""
    photograph, panels = parts.photograph, parts.panels
    columns, pictures = across(photograph, panels), with_photograph(photograph, panels, parts.smooth)
    rows = -(-len(pictures) // columns)
    width, height = (side / _DPI for side in photograph.size)
    column, row = max(width, PANEL / _DPI) + _GAP, height + 6 * _SIZE / 72 + _GAP
    page.set_size_inches(max(2, columns) * column, rows * row + _LEGEND)
    above, below = page.subfigures(2, 1, height_ratios=[rows * row, _LEGEND])
    for place, panel in enumerate(pictures):
        axes = above.add_subplot(rows, columns, place + 1)
        axes.imshow(np.asarray(panel.picture), interpolation="none")  # as it is, not drawn anew
        title = textwrap.fill(panel.title, _LINE, max_lines=2, placeholder="…")
        axes.set_title(f"{title}\n{panel.subtitle}", fontsize=_SIZE)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
        if panel.scores.size:
            axes.set_xlabel(score_range(panel.scores), fontsize=_SIZE)
    bar = below.add_subplot()
    bar.imshow(np.asarray(parts.scale), interpolation="none", aspect="auto", extent=(0, 1, 0, 1))
    marked = ticks(parts.limit)
    bar.set_xticks([*marked], [*marked.values()], fontsize=_SIZE)
    bar.set_yticks([])
    bar.set_xlabel(f"{parts.unit}\n{parts.note}", fontsize=_SIZE)
    for side, text in zip(("left", "right"), SIDES, strict=True):
        bar.set_title(text, loc=side, fontsize=_SIZE)
