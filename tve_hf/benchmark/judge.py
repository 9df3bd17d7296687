"""The computations of an evaluation, cell by cell: what each method says of a batch, its cost, how faithful it is."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any
from urllib.parse import quote

import torch
from datasets import Dataset
from PIL.Image import Image as Picture
from torch import Tensor

from .. import methods
from ..attribution import exact_meta_attribution, rule_of, transfer
from ..classifiers import SplitClassifier
from ..coalitions import Coalitions
from ..faithfulness import faithfulness, true_evidence
from ..fidelity import fidelity
from ..geometry import seen_region
from ..modeling_tve import TVEExplainer
from ..sources import read_image
from ..verification import pearson, prediction_errors, spearman
from ..visualization import Photograph, gallery
from ..vit_shapley.modeling import ShapleyExplainer
from .cells import Cells, digest
from .cost import Cost, counting, own_share

NUM_COALITIONS = 64  # that maps are to foretell, for each image
# Tensors of a cell that are of its whole batch; all others have a row for each image.
_OF_A_BATCH = {*(field.name for field in fields(Cost)), "sparsity"}


@torch.no_grad()
def agreement(
    classifier: SplitClassifier, explainer: TVEExplainer, pixel_values: Tensor, class_idx: Tensor, rule: str | None
) -> dict[str, Tensor]:
    """Compare the explainer with the exact attribution of all patches, or, for random backgrounds, with coalitions.

    Returns:
        Values of each image, (B,): correlations and errors as in `verification.Verification`, or `r2` and
        `faithfulness` as in `faithfulness.Faithfulness`; and the maps (B, rows, cols) of `tve`, and of `exact` for
        antithetical backgrounds, with the cost of each, as `tve/seconds` and so on.
    """
    config = explainer.config
    shape = config.grid_shape
    rule = rule or rule_of(config)
    reading = classifier.reading(tuple(config.feature_names))
    with counting(classifier.backbone) as tve_cost:
        seen = reading(pixel_values)
        output = explainer(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
        predicted = output.kept, output.removed
        tve = transfer(*predicted, classifier, class_idx, rule, config.grid_size, config.hops)
    maps = {"tve": tve.unflatten(1, shape)} | _costs("tve", tve_cost)
    if config.backgrounds == "random":
        logits = transfer(*predicted, classifier, class_idx[:, None], "logit", config.grid_size, config.hops)
        checks = faithfulness(
            classifier, pixel_values, logits, class_idx[:, None], NUM_COALITIONS, config.distribution, shape
        )
        names = {"r2": "r2", "faithfulness": "pearson"}
        return maps | {key: torch.tensor([getattr(check, name) for (check,) in checks]) for key, name in names.items()}
    with counting(classifier.backbone) as exact_cost:
        exact = exact_meta_attribution(classifier, pixel_values, config.grid_size, config.hops)
        scores = transfer(*exact, classifier, class_idx, rule, config.grid_size, config.hops)
    return {
        "spearman": spearman(tve, scores),
        "pearson": pearson(tve, scores),
        **prediction_errors(classifier, pixel_values, class_idx, predicted, exact),
        **maps,
        "exact": scores.unflatten(1, shape),
        **_costs("exact", exact_cost),
    }


def foretelling(scores: Tensor, coalitions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Faithfulness correlation of maps (B, rows, cols): sums of scores against true logits over coalitions, (B,)."""
    keep, true = (coalitions[name].to(scores.device).double() for name in ("keep", "true"))
    return {"faithfulness": pearson(scores.flatten(1).double() @ keep.T, true)}


def _costs(name: str, cost: Cost) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in cost.tensors().items()}


def parse_method(spec: str) -> tuple[str, dict[str, int]]:
    """Read `name` or `name@samples` as a method and its options; tve@25 refines the map by 25 masked passes.

    Raises:
        ValueError: If there is no such method, or it draws no samples.
    """
    name, at, samples = spec.partition("@")
    parameters = inspect.signature(methods.load(name)).parameters
    if not at:
        return name, {}
    option = next((option for option in ("n_samples", "refine") if option in parameters), None)
    if option is None:
        raise ValueError(f"{spec!r}: {name} draws no samples; pass it without @.")
    if not samples.isdigit() or int(samples) < 1:
        raise ValueError(f"{spec!r}: {samples!r} is no number of samples; write {name}@400, for example.")
    return name, {option: int(samples)}


def options_of(spec: str, offered: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Read a spec as a method and its options, among them what it takes of those on offer."""
    name, options = parse_method(spec)
    parameters = inspect.signature(methods.load(name)).parameters
    return name, options | {key: value for key, value in offered.items() if key in parameters and value is not None}


def refusal(
    classifier: SplitClassifier, spec: str, grid: tuple[int, int], offered: dict[str, Any]
) -> ValueError | ImportError | None:
    """Why a method cannot serve this classifier, or None: tried on one image, with as few samples as may be."""
    name, options = options_of(spec, offered)
    parameters = inspect.signature(methods.load(name)).parameters
    options |= {key: 2 for key in ("n_samples", "n_steps") if key in parameters}
    pixel_values = classifier.probe()[:1]
    try:
        methods.explain(
            name, classifier, pixel_values, torch.zeros(1, dtype=torch.int64).to(pixel_values.device), grid, **options
        )
    except (ValueError, ImportError) as error:
        return error
    return None


@dataclass
class Judge:
    """Computes and keeps the cells of one evaluation: classes, maps, agreement and fidelity of each batch.

    Args:
        classifier: on the device to compute on.
        explainer: of its backbone, or None: then there is no agreement to compute.
        data: encoded images, and labels if it has any.
        rows: which row of the test files each image is.
        cells: where results are kept.
        specs: methods, as `name` or `name@samples`.
        refused: why others cannot serve this classifier.
        removals: keys of `patches.REMOVALS`.
        grid: of the maps, (rows, cols).
        hops: radius of a patch's neighbourhood.
        rule: how embeddings become scores, a key of `attribution.RULES`; each method's own if None.
        image_column: of `data`.
        shapley_explainer: of its head, for the method vit_shapley.
    """

    classifier: SplitClassifier
    explainer: TVEExplainer | None
    data: Dataset
    rows: list[int]
    cells: Cells
    specs: list[str]
    refused: dict[str, str]
    removals: list[str]
    grid: tuple[int, int]
    hops: int
    rule: str | None
    batch_size: int
    seed: int
    image_column: str
    shapley_explainer: ShapleyExplainer | None = None

    def __post_init__(self) -> None:
        own = {"agreement": self.explainer, "tve": self.explainer, "vit_shapley": self.shapley_explainer}
        digests = {id(explainer): digest(explainer)[:16] for explainer in own.values() if explainer is not None}
        self.digests = {name: digests[id(explainer)] for name, explainer in own.items() if explainer is not None}

    def key(self, name: str, start: int, stop: int) -> str:
        """The key of a batch's cell: under what it depends on beside the settings of all cells."""
        folders = [f"column={quote(self.image_column, safe='')}", name]
        made_by = self.digests.get(name.rpartition("/")[2].partition("@")[0])
        if made_by is not None:
            folders.append(f"explainer={made_by}")
        return "/".join([*folders, f"{start:06}-{stop:06}"])

    def batches(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self.data), self.batch_size):
            yield start, min(start + self.batch_size, len(self.data))

    def pixels(self, start: int, stop: int) -> Tensor:
        images = [read_image(row) for row in self.data[start:stop][self.image_column]]
        pixel_values = self.classifier.image_processor(images, return_tensors="pt")["pixel_values"]
        return pixel_values.to(self.classifier.device)

    def classes(self, pixel_values: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"class_idx": self.classifier(pixel_values).logits.argmax(-1)}

    def explain(self, spec: str, pixel_values: Tensor, class_idx: Tensor, start: int) -> dict[str, Tensor]:
        """One method's maps of a batch, and what they cost."""
        offered = {
            "explainer": self.explainer,
            "shapley_explainer": self.shapley_explainer,
            "rule": self.rule,
            "hops": self.hops,
            # Seeded by the batch, so that a resumed evaluation draws what an uninterrupted one draws.
            "generator": torch.Generator().manual_seed(self.seed + start),
        }
        name, options = options_of(spec, offered)
        with counting(self.classifier.backbone) as cost:
            scores = methods.explain(name, self.classifier, pixel_values, class_idx, self.grid, **options)
        return {"scores": scores, **cost.tensors()}

    def explainer_share(self, spec: str) -> float:
        """What the explainer that a method reads computes itself, in passes of the classifier; 0 if it reads none."""
        name = parse_method(spec)[0]
        offered = {"explainer": self.explainer, "shapley_explainer": self.shapley_explainer, "rule": self.rule}
        options = options_of(name, offered)[1]
        if not options.keys() & {"explainer", "shapley_explainer"}:
            return 0.0
        class_idx = torch.zeros(1, dtype=torch.int64, device=self.classifier.device)
        explain = partial(methods.explain, name, self.classifier, class_idx=class_idx, grid_size=self.grid, **options)

        def share() -> dict[str, Tensor]:
            explain(pixel_values=self.classifier.probe()[:1])  # that the explainer fits takes passes, once
            return {"share": torch.tensor(own_share(self.classifier, lambda pixels: explain(pixel_values=pixels)))}

        return self.cells.get(self.key(f"share/{spec}", 0, 1), share)["share"].item()

    def compute(self, start: int, stop: int) -> None:
        """Compute all cells of one batch that have not been computed yet."""

        def cell(name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            return self.cells.get(self.key(name, start, stop), compute)

        pixel_values = self.pixels(start, stop)
        classes = cell("classes", lambda: self.classes(pixel_values))
        class_idx = classes["class_idx"].to(pixel_values.device)
        explainer = self.explainer
        if explainer is not None:
            both = cell("agreement", lambda: agreement(self.classifier, explainer, pixel_values, class_idx, self.rule))
            for name in {"tve", "exact"} & both.keys():
                maps = {key: both[f"{name}/{key}"] for key in ("seconds", "forward", "backward")}
                cell(f"maps/{name}", partial(dict, maps, scores=both[name]))
        true = cell(f"coalitions/{self.backgrounds}", lambda: self.coalitions(pixel_values, class_idx))
        for spec in self.specs:
            explain = partial(self.explain, spec, pixel_values, class_idx, start)
            maps = cell(f"maps/{spec}", explain)
            scores = maps["scores"].to(pixel_values.device)
            cell(f"faithfulness/{self.backgrounds}/{spec}", partial(foretelling, scores, true))
            for removal in self.removals:
                judged = partial(self.fidelity, pixel_values, scores, class_idx, removal)
                cell(f"fidelity/{removal}/{spec}", judged)

    @property
    def distribution(self) -> Coalitions:
        """Of the coalitions that every map is to foretell: the explainer's, where it learnt from any."""
        config = self.explainer.config if self.explainer else None
        return config.distribution if config and config.backgrounds == "random" else Coalitions()

    @property
    def backgrounds(self) -> str:
        """What stands for these coalitions in the keys of cells."""
        return f"{self.removals[0]}-{'-'.join(map(str, self.distribution))}"

    def coalitions(self, pixel_values: Tensor, class_idx: Tensor) -> dict[str, Tensor]:
        """Random coalitions, (n, N), and the true logits of each image's class with them, (B, n)."""
        asked = NUM_COALITIONS, self.distribution, self.grid, self.removals[0]
        keep, true = true_evidence(self.classifier, pixel_values, class_idx[:, None], *asked)
        return {"keep": keep, "true": true.squeeze(1)}

    def fidelity(self, pixel_values: Tensor, scores: Tensor, class_idx: Tensor, removal: str) -> dict[str, Tensor]:
        """Fidelity of one method's maps of a batch under one removal operator."""
        curves = fidelity(self.classifier, pixel_values, scores, class_idx, removal=removal)
        names = ("sparsity", "plus", "minus", "plus_auc", "minus_auc")
        return {name: getattr(curves, name).clone() for name in names}

    def gather(self, name: str) -> dict[str, Tensor]:
        """The tensors of a cell over all batches: a row for each image, or for each batch where one is of it all."""
        parts = [self.cells.get(self.key(name, start, stop)) for start, stop in self.batches()]
        return {
            key: (torch.stack if key.rpartition("/")[2] in _OF_A_BATCH else torch.cat)([part[key] for part in parts])
            for key in parts[0]
        }

    def gallery(self, count: int) -> Picture:
        """Maps of the first images side by side, one column for each method."""
        maps = {spec: self.gather(f"maps/{spec}")["scores"][:count] for spec in self.specs}
        classes = self.gather("classes")["class_idx"][:count].tolist()
        rows = []
        for i in range(len(classes)):
            picture = read_image(self.data[i][self.image_column])
            photograph = Photograph(picture, seen_region(self.classifier.image_processor, picture.size), 448)
            rows.append([photograph.image(), *(photograph.overlay(maps[spec][i]) for spec in self.specs)])
        titles = [self.classifier.id2label[index] for index in classes]
        return gallery(rows, ["image", *self.specs], titles)
