"""What a classifier is, how it splits, and which explainers fit it."""

from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from ..classifiers import split_classifier
from ..compatibility import verdict_by_name
from ..hub_errors import asking_hub
from ..released import TAG


def explainers_of(author: str) -> list[str]:
    """List the repositories of a user or organisation that are tagged as ours, sorted.

    Raises:
        OSError: If the Hub cannot be reached or refuses.
    """
    with asking_hub(author):
        return sorted(model.id for model in HfApi().list_models(author=author, filter=TAG))


def explainers_in(collection: str) -> list[str]:
    """List the models of a collection of the Hub, in its order, whatever they are.

    Args:
        collection: its slug, owner/title-id, as at the end of its address.

    Raises:
        OSError: If there is none, or the Hub cannot be reached or refuses.
    """
    with asking_hub(collection):
        try:
            items = HfApi().get_collection(collection).items
        except HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            items = None
    if items is None:
        raise OSError(
            f"There is no collection {collection!r} at {constants.ENDPOINT} that you may see; pass the end of its "
            "address, owner/title-id."
        )
    return [item.item_id for item in items if item.item_type == "model"]


@torch.no_grad()
def describe(name: str, explainers: Iterable[str] = ()) -> dict[str, Any]:
    """Split a classifier and describe it, in values that JSON holds.

    Args:
        name: name or folder of the classifier.
        explainers: names or folders to compare it with; only their config.json is read.

    Raises:
        ValueError, OSError: As `split_classifier`.
    """
    classifier = split_classifier(name)
    probe = classifier.probe_inputs()
    output = classifier.backbone(**probe)
    size = probe["pixel_values"].shape[-2:]
    try:
        grid = list(classifier.default_grid())
    except ValueError:  # no grid divides its images
        grid = None
    verdicts = {explainer: verdict_by_name(explainer, classifier) for explainer in explainers}
    features = zip(classifier.backbone.feature_names, output.features, strict=True)
    return {
        "classifier": name,
        "classes": [classifier.id2label[index] for index in sorted(classifier.id2label)],
        "multi_label": classifier.multi_label,
        "image_size": list(size) if probe["pixel_values"].ndim == 4 else None,
        "embedding_dim": classifier.embedding_dim,
        "head": list(classifier.backbone.head_names),
        "features": {module: list(feature.shape[1:]) for module, feature in features},
        "grid": grid,
        "fingerprint": classifier.fingerprint(),
        "explainers": [
            {"explainer": explainer, "fit": verdict.fit, "reason": verdict.reason}
            for explainer, verdict in verdicts.items()
        ],
    }


def classes_with(word: str, name: str) -> dict[int, str]:
    """The classes of a classifier whose names hold a word, or part of one, in any case: class -> name.

    Args:
        word: to look for; all classes if it is empty.
        name: name or folder of the classifier.

    Raises:
        ValueError: If there is none; the message names similar ones, if any.
        OSError: As `split_classifier`.
    """
    classifier = split_classifier(name)
    wanted = word.strip().casefold()
    found = {index: label for index, label in sorted(classifier.id2label.items()) if wanted in label.casefold()}
    return found or {index: classifier.id2label[index] for index in [classifier.class_index(word)]}


def text_of(description: dict[str, Any]) -> str:
    """What `describe` returns, for people to read."""

    def sides(values: list[int] | None) -> str:
        return " x ".join(map(str, values)) if values else "as each image has it"

    classes = description["classes"]
    some = ", ".join(classes[:3]) + (", ..." if classes[3:] else "")
    grid = description["grid"]
    cost = f", so exact maps take 2·{grid[0] * grid[1]} masked passes each" if grid else ""
    lines = {
        "classes": f"{len(classes)}: {some}" if classes else "none until candidate labels are given",
        "images": f"{sides(description['image_size'])} pixels" if description["image_size"] else "rows of patches",
        "head": f"{' + '.join(description['head'])}, reads D = {description['embedding_dim']}",
        "features": "; ".join(f"{name} ({sides(shape)})" for name, shape in description["features"].items()),
        "grid": f"{sides(grid)} patches{cost}" if grid else "none divides the images; pass grid_size",
        "fingerprint": description["fingerprint"],
    }
    text = [description["classifier"], *(f"  {name:12} {value}" for name, value in lines.items()), "explainers"]
    text += [f"  {one['explainer']}: {one['fit']}; it {one['reason']}" for one in description["explainers"]]
    return "\n".join(text if description["explainers"] else [*text, "  none"])
