"""The card of a data set of maps: what made them, in words and in settings."""

from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import DatasetCardData

from ..attribution import unit_of
from ..compatibility import quality_in_words
from ..hub.model_card import TEMPLATES, table
from ..released import TAG
from .shards import DATA

_TRUST = {
    "verify": "how much of what {verify} random maskings do to the class the map accounts for (R²), or, of an "
    "explainer of two backgrounds, how well it agrees with the exact scores of {verify} patches (Spearman)",
    "held-out": "the same for all rows: what the explainer reached on held-out images, as said below",
    None: "empty: the method was not measured; pass `--verify`",
}


def render(folder: Path, settings: dict[str, Any], quality: dict[str, Any] | None) -> str:
    """The card of a folder of maps, README.md, by which `load_dataset` finds them.

    Args:
        folder: of the maps.
        settings: of the run.
        quality: of the explainer, `TVEConfig.quality`.
    """
    with_explainer = settings["method"] == "tve"
    quality = quality if with_explainer else None
    classes = "the class that is explained, and the classifier's probability for it"
    top = settings.get("top_k", 1)
    several = top > 1 or len(settings.get("class_idx") or settings.get("label") or []) > 1
    trust = "verify" if settings.get("verify") else "held-out" if quality else None
    values = {
        "title": f"Maps of {settings['classifier']}",
        "classifier": settings["classifier"],
        "source": settings["source"],
        "repo": str(folder),
        "how": f"by the explainer `{settings['explainer']}`" if with_explainer else f"method `{settings['method']}`",
        "class_of_row": f"{classes}; an image has a row for each class" if several else classes,
        "unit": unit_of(settings.get("rule")),
        "trust": _TRUST[trust].format(**settings),
        "quality": quality_in_words(quality) if with_explainer else "",
        "settings": table([["setting", "value"], *([f"`{name}`", f"`{value}`"] for name, value in settings.items())]),
    }
    data = DatasetCardData(tags=[TAG], configs=[{"config_name": "default", "data_files": f"{DATA}/*.parquet"}])
    return f"---\n{data.to_yaml()}\n---\n\n" + Template((TEMPLATES / "maps.md").read_text()).substitute(values)
