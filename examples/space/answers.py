"""What the page answers, without the page: strangers' images and models, within limits.

Visitors reach no file of the machine, no address and no private repository: only public repositories of the Hub by
name, in safetensors and without code of their own. What cannot be done is a ValueError, an OSError or a TimeoutError
whose message is a sentence for them.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, constants, scan_cache_dir
from PIL import Image
from torch import nn
from transformers import pipeline

import tve_hf
from tve_hf.compatibility import quality_in_words
from tve_hf.fidelity import even_shares, most_important
from tve_hf.files import dumps
from tve_hf.hub_errors import asking_hub
from tve_hf.images import load_image
from tve_hf.messages import sentence, verified
from tve_hf.released import CHECKPOINTS, DEFAULT_CLASSIFIER
from tve_hf.visualization import Explanation, color_limit, heatmap, overlay, picture_html

MAX_PIXELS = 40_000_000  # of an image
MAX_MODEL, MAX_MODELS = 1.5e9, 3  # bytes of a model's weights; models in memory at once
MAX_SECONDS = 120  # of passes for one answer
MAX_PROMPTS, MAX_PROMPT = 20, 200  # and characters of each
MAX_PICTURE = 1000  # pixels of a longer side
TOP_K, VERIFY, LEVELS = 5, 32, 11  # classes; masked passes that check a map; shares of patches to remove

SHIPPED, FROM_HUB, PROMPTS = "A shipped classifier", "A name on the Hub", "Prompts"
CLIP = "openai/clip-vit-base-patch16"
SIGNS: dict[str, tuple[float | None, float | None]] = {
    "For and against": (None, None),
    "For the class": (0, None),
    "Against the class": (None, 0),
}
RIVALS = {"LeGrad": "legrad", "Grad-CAM": "grad_cam", "Sampled": "sampled"}
_REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_GREY = np.array([124, 116, 104], np.uint8)  # what removed patches are painted with


@dataclass
class Answer:
    """What a visitor was last shown, kept for what is asked next.

    Args:
        path: of the image.
        name: of the classifier.
        prompts: its classes, if it is a zero-shot one.
        explanations: of the most probable classes.
        falls: by class, its probability with the most and with the least relevant patches removed, (LEVELS,) each.
    """

    path: str
    name: str
    prompts: list[str] | None
    explanations: list[Explanation]
    falls: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


class Models:
    """The pipelines used last, by the name of their classifier, and no files of others from the Hub.

    Args:
        number: of pipelines that are kept.
    """

    def __init__(self, number: int):
        self.number = number
        self.kept: OrderedDict[str, Any] = OrderedDict()

    def get(self, name: str) -> Any:
        """Load a pipeline, or take the one that is there; the longest unused one makes room first."""
        if name not in self.kept:
            while len(self.kept) >= self.number:
                _forget(self.kept.popitem(last=False)[0])
            try:
                _check_size(name)
                self.kept[name] = pipeline("transferable-attribution", classifier=name)
            finally:
                if name not in self.kept:
                    _forget(name)
        self.kept.move_to_end(name)
        return self.kept[name]


def _check_size(name: str) -> None:
    """Refuse a repository with more weights than the limit, before any of them is fetched."""
    if Path(name).is_dir():
        return
    with asking_hub(name):
        files = HfApi().list_repo_tree(name, recursive=True)
        size = sum(getattr(file, "size", 0) for file in files if file.path.endswith(".safetensors"))
    if size > MAX_MODEL:
        raise ValueError(f"{name} has {size / 1e9:.1f} GB of weights, and this page takes {MAX_MODEL / 1e9:.1f} GB.")


def _forget(name: str) -> None:
    """Delete what was fetched of a repository."""
    if Path(constants.HF_HUB_CACHE).is_dir():
        found = scan_cache_dir(constants.HF_HUB_CACHE)
        found.delete_revisions(
            *(revision.commit_hash for repo in found.repos if repo.repo_id == name for revision in repo.revisions)
        ).execute()


MODELS = Models(MAX_MODELS)


def shipped() -> list[str]:
    """The classifiers of the package, the default one first."""
    heads = [path.parent.name for path in sorted(CHECKPOINTS.glob("*/head.safetensors"))]
    return sorted(heads, key=lambda name: name != DEFAULT_CLASSIFIER.name)


def photograph(path: str | None) -> Image.Image:
    """Open an uploaded image, unless it is larger than the limit."""
    if path is None:
        raise ValueError("There is no image; drop one, or take an example.")
    try:
        with Image.open(path) as header:  # nothing is decoded yet
            too_large = prod(header.size) > MAX_PIXELS
    except (OSError, SyntaxError, ValueError):  # said better below
        too_large = False
    except Image.DecompressionBombError:
        too_large = True
    if too_large:
        raise ValueError(f"The image has more than {MAX_PIXELS // 10**6} million pixels; shrink it.")
    return load_image(path)


def classifier_named(source: str, own: str, repository: str, prompts: str) -> tuple[str, list[str] | None]:
    """The folder or repository of the classifier that is asked for, and its classes where prompts say them."""
    if source == SHIPPED:
        return str(CHECKPOINTS / own), None
    name = repository.strip()
    if not _REPOSITORY.fullmatch(name) or Path(name).exists():
        raise ValueError(f"{name[:100]!r} is no name of a repository on the Hub; give one such as {CLIP}.")
    if source == FROM_HUB:
        return name, None
    labels = [line.strip() for line in re.split(r"[\n,]", prompts) if line.strip()]
    if not labels:
        raise ValueError("There are no prompts; write what the image may show, such as: a cat, a dog.")
    if len(labels) > MAX_PROMPTS or len(max(labels, key=len)) > MAX_PROMPT:
        raise ValueError(
            f"This page takes {MAX_PROMPTS} prompts of {MAX_PROMPT} characters; write fewer or shorter ones."
        )
    return name, labels


@contextmanager
def limited(model: nn.Module) -> Iterator[None]:
    """Give up before a pass of a model that begins after the limit of time."""
    end = time.monotonic() + MAX_SECONDS

    def check(*_: Any) -> None:
        if time.monotonic() > end:
            raise TimeoutError(f"This took more than {MAX_SECONDS} s; ask for fewer passes, or take a smaller model.")

    handle = model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def explain(path: str | None, source: str, own: str, repository: str, prompts: str, passes: int) -> Answer:
    """Explain the most probable classes of an image.

    Args:
        path: of the image.
        source: `SHIPPED`, `FROM_HUB` or `PROMPTS`; which of the next three count.
        own: one of `shipped()`.
        repository: name of a classifier on the Hub; or of a zero-shot model, for prompts.
        prompts: its classes, one a line or between commas.
        passes: masked passes that correct the explainer's map, or, where none fits, make one; 0 for as many as usual.
    """
    photo = photograph(path)
    name, labels = classifier_named(source, own, repository, prompts)
    explainer = MODELS.get(name)
    asked: dict[str, Any] = {"top_k": TOP_K, "verify": VERIFY, "candidate_labels": labels, "max_size": MAX_PICTURE}
    if passes:
        asked |= {"refine": passes} if explainer.has_explainer else {"method_kwargs": {"n_samples": passes}}
    with limited(explainer.classifier.backbone.model):
        return Answer(str(path), name, labels, explainer(photo, **asked))


def draw(answer: Answer | None, k: int, opacity: float, sign: str, smooth: bool) -> str:
    """The map of a class over the photograph."""
    if answer is None:
        return ""
    one = answer.explanations[k]
    scores, photo = one["attribution"], one.photograph
    shown = scores if SIGNS[sign] == (None, None) else scores.clip(*SIGNS[sign])
    colors = heatmap(shown, photo.size, photo.region, color_limit(scores), smooth)
    picture = overlay(photo.image(), colors, photo.region, opacity / 100)
    return picture_html(picture, f"Map of {one['label']} over the photograph: red for it, blue against it")


def trust(answer: Answer | None, k: int) -> str:
    """How the map of a class was made, and how far it is to be trusted."""
    if answer is None:
        return ""
    one = answer.explanations[k]
    how = "by the explainer" if one["method"] == "tve" else f"by the method {one['method']}, without an explainer"
    lines = [f"The map was made {how}; its unit is {one.unit}."]
    lines += [quality_in_words(one["quality"])] if one["method"] == "tve" else []
    return "\n".join(f"- {line}" for line in [*lines, f"This map {verified(one).strip()}."])


def files(answer: Answer | None, k: int) -> Iterator[tuple[str | None, str | None]]:
    """The picture and the map of a class, as files; the page copies them before they are deleted."""
    if answer is None:
        yield None, None
        return
    one, drawn = answer.explanations[k], ("heatmap", "overlay", "figure")
    values = {key: one[key] for key in one if key not in drawn} | {"attribution": one["attribution"].tolist()}
    with TemporaryDirectory() as folder:
        picture, record = Path(folder, "explanation.png"), Path(folder, "explanation.json")
        one["figure"].save(picture)
        record.write_text(dumps({"classifier": Path(answer.name).name, **values}, indent=1) + "\n")
        yield str(picture), str(record)


def remove(answer: Answer | None, k: int, percent: float) -> tuple[str, str]:
    """The photograph without its most relevant patches, and what that does to the probability of the class."""
    if answer is None:
        return "", ""
    one = answer.explanations[k]
    scores = torch.from_numpy(one["attribution"])[None]
    if k not in answer.falls:
        answer.falls[k] = _fall(answer, one, scores)
    most, least = answer.falls[k]
    level = round(percent / 100 * (len(most) - 1))
    gone = most_important(scores.flatten(1), [even_shares(len(most), scores[0].numel())[level]])
    where = heatmap(gone.view(scores[0].shape).float(), one.photograph.size, one.photograph.region, 1.0, smooth=False)
    picture = np.where((where > 0.75)[..., None], _GREY, np.asarray(one.photograph.image()))
    text = (
        f"Without the most relevant {percent:.0f} % of the patches, the probability of {one['label']!r} is "
        f"{most[level]:.1%} instead of {most[0]:.1%}. Without as many of the least relevant, it is {least[level]:.1%}."
    )
    return picture_html(Image.fromarray(picture), "The photograph with the removed patches painted grey"), text


def _judged(answer: Answer, one: Explanation, scores: torch.Tensor) -> tve_hf.Fidelity:
    classifier = MODELS.get(answer.name).classifier
    classifier = classifier.with_prompts(answer.prompts) if answer.prompts else classifier
    levels = min(LEVELS, scores[0].numel() + 1)
    with limited(classifier.backbone.model):
        return tve_hf.fidelity(classifier, [photograph(answer.path)], scores, one["class_idx"], num_levels=levels)


def _fall(answer: Answer, one: Explanation, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a class as more of the most, and of the least relevant patches are removed."""
    found = _judged(answer, one, scores)
    # At sparsity s, S* is the 1 - s most relevant: without it, or with nothing else.
    return one["score"] - found.plus[0].flip(0).numpy(), one["score"] - found.minus[0].numpy()


def compare(answer: Answer | None, k: int) -> str:
    """The maps of other methods of the same class on the same grid, and what removing patches by each says."""
    if answer is None:
        raise ValueError("There is nothing to compare yet; explain an image first.")
    one, explainer, photo = answer.explanations[k], MODELS.get(answer.name), photograph(answer.path)
    asked = {"class_idx": one["class_idx"], "candidate_labels": answer.prompts}
    grid = {"grid_size": one["attribution"].shape}
    shown: list[tuple[str, Explanation]] = [("Explainer" if one["method"] == "tve" else "Sampled", one)]
    notes = []
    with limited(explainer.classifier.backbone.model):
        for title, method in RIVALS.items():
            if method == one["method"]:
                continue
            try:
                (other,) = explainer(photo, method=method, method_kwargs=grid, **asked)
            except ValueError as error:  # it does not serve this classifier
                notes.append(f"{title}: {sentence(error)}")
                continue
            shown.append((title, other))
    gaps = [_judged(answer, other, torch.from_numpy(other["attribution"])[None]).gap.item() for _, other in shown]
    pictures = [
        f'<figure style="margin: 0">{picture_html(other["overlay"], f"Map by {title}")}'
        f"<figcaption>{title}: fidelity gap {gap:+.2f}</figcaption></figure>"
        for (title, other), gap in zip(shown, gaps, strict=True)
    ]
    columns = "display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr))"
    return f'<div style="{columns}">{"".join(pictures)}</div>{"".join(f"<p>{escape(note)}</p>" for note in notes)}'
