"""Explanations as HTML, for notebooks and pages: pictures with a text for those who do not see them, and facts."""

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from io import BytesIO
from typing import Any

from PIL import Image

from ..messages import verified

_QUALITY = 90  # of a JPEG


def picture_html(picture: Image.Image, text: str) -> str:
    """An `<img>` that holds a picture and is no wider than where it stands; `text` stands for it, and is escaped."""
    packed = BytesIO()
    picture.convert("RGB").save(packed, "JPEG", quality=_QUALITY)
    data = b64encode(packed.getvalue()).decode()
    return f'<img alt="{escape(text)}" style="max-width: 100%" src="data:image/jpeg;base64,{data}">'


def explanation_html(explanation: Mapping[str, Any], unit: str) -> str:
    """The overlay of an explanation, and below it what it says in numbers.

    Args:
        explanation: as of the pipeline.
        unit: of its scores.
    """
    label, scores = explanation["label"], explanation["attribution"]
    facts = {
        "class": f"{label}, probability {explanation['score']:.1%}",
        "made by": ", rule ".join(str(explanation[key]) for key in ("method", "rule") if explanation.get(key)),
        "scores": f"{scores.min():+.3g} to {scores.max():+.3g}, {unit}; {' x '.join(map(str, scores.shape))} patches",
        "explainer": ", ".join(f"{name} {value:.3g}" for name, value in (explanation.get("quality") or {}).items()),
        "verified": verified(explanation).strip() if "verification" in explanation else "",
    }
    rows = (
        f'<tr><th style="text-align: left">{name}</th><td style="text-align: left">{escape(fact)}</td></tr>'
        for name, fact in facts.items()
        if fact
    )
    picture = picture_html(explanation["overlay"], f"Map of {label} over the photograph: red for it, blue against it")
    return f"<div>{picture}<table>{''.join(rows)}</table></div>"
