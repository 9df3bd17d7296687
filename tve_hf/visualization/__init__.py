"""Pictures of attributions: signed maps coloured over their photographs, with and without a legend."""

from ..geometry import Region
from .drawing import MAX_SIZE, Explanation, Photograph, color_limit, figure, heatmap, overlay
from .html import picture_html
from .sheet import gallery
from .vector import savefig

__all__ = [
    "MAX_SIZE",
    "Explanation",
    "Photograph",
    "Region",
    "color_limit",
    "figure",
    "gallery",
    "heatmap",
    "overlay",
    "picture_html",
    "savefig",
]
