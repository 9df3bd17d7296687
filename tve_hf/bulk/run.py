"""One pass over a data set: rows are decoded ahead of the model, explained, and written behind it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import groupby, islice
from typing import Any

import torch

from ..compatibility import measures_of
from ..sources import UNREADABLE, read_image
from .ahead import ahead, num_workers
from .shards import Folder
from .work import Row, Work

Prepared = dict[str, Any] | Exception  # what the pipeline's `preprocess` makes of an image, or why it cannot
Explained = tuple[Row, list[dict[str, Any]]]  # a row of the data, and its rows in the shard, one for each class


def prepared_batches(
    pool: Executor, explainer: Any, rows: Iterable[Row], batch_size: int
) -> Iterator[list[tuple[Row, Prepared]]]:
    """Decode and process images in other threads, ahead of the model; batches of them, in order."""

    def prepare(row: Row) -> Prepared:
        try:
            inputs = explainer.preprocess(read_image(row.image), **explainer._preprocess_params)
        except UNREADABLE as error:
            return error
        return inputs | {"image": (None, None, None)}  # nothing is drawn on it

    items = ahead(pool, prepare, rows, 2 * batch_size)
    while batch := list(islice(items, batch_size)):
        yield batch


def results_of(explainer: Any, prepared: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Call the models on processed images: for each what the pipeline's `_forward` gives."""
    places = defaultdict(list)  # some processors keep the shape of each image
    for place, inputs in enumerate(prepared):
        places[inputs["pixel_values"].shape].append(place)
    results: dict[int, dict[str, Any]] = {}
    for alike in places.values():
        inputs = {
            name: [prepared[place][name] for place in alike]
            if name == "image"
            else torch.cat([prepared[place][name] for place in alike])
            for name in prepared[alike[0]]
        }
        results |= zip(alike, explainer.forward(inputs, **explainer._forward_params)["results"], strict=True)
    return [results[place] for place in range(len(prepared))]


def explained(explainer: Any, batch: list[tuple[Row, Prepared]]) -> Iterator[Explained]:
    """Explain a batch; what cannot be read, or gives no finite scores, becomes a row with its error.

    Raises:
        ValueError: If no image of several can be explained, which is not their fault.
    """
    outcomes: dict[int, Any] = {i: outcome for i, (_, outcome) in enumerate(batch)}
    readable = {i: outcome for i, outcome in outcomes.items() if not isinstance(outcome, Exception)}
    try:
        outcomes |= zip(readable, results_of(explainer, [*readable.values()]), strict=True)
    except ValueError:
        failed: list[ValueError] = []
        for i, inputs in readable.items():
            try:
                (outcomes[i],) = results_of(explainer, [inputs])
            except ValueError as error:
                outcomes[i] = error
                failed.append(error)
        if len(failed) == len(readable) > 1:
            raise
    for i, (row, _) in enumerate(batch):
        yield row, _records(explainer, row, outcomes[i])


def _records(explainer: Any, row: Row, outcome: dict[str, Any] | Exception) -> list[dict[str, Any]]:
    """The rows of one image in its shard, see `shards.FEATURES`."""
    path = row.image.get("path") if isinstance(row.image, dict) else row.image
    known = {"id": row.id, "image": path if isinstance(path, str) else None}
    if isinstance(outcome, Exception):
        return [known | {"error": " ".join(str(outcome).split()) or type(outcome).__name__}]
    checks = outcome["verification"] or [None] * len(outcome["labels"])
    return [
        known
        | {
            "label": label,
            "class_idx": class_idx,
            "probability": probability,
            "map": [*scores.half().numpy()],
            "trust": _trust(explainer.quality if outcome["method"] == "tve" else None, check),
        }
        for label, class_idx, probability, scores, check in zip(
            outcome["labels"],
            outcome["class_idx"].tolist(),
            outcome["score"].tolist(),
            outcome["attribution"],
            checks,
            strict=True,
        )
    ]


def _trust(quality: dict[str, Any] | None, check: Any) -> float | None:
    """How far to trust a map: its own verification, or else what the explainer reached on held-out images."""
    if check is not None:
        return check.r2 if hasattr(check, "r2") else check.spearman
    measures = measures_of(quality) if quality else {}
    return measures.get("logit_r2", measures.get("spearman"))


def explain_rows(
    explainer: Any,
    work: Work,
    folder: Folder,
    finished: dict[tuple[int, int], int],
    batch_size: int,
    advance: Callable[[int], Any] = lambda number: None,
) -> Iterator[tuple[int, int]]:
    """Explain this process's rows that are in no finished shard, and write them shard by shard.

    Decoding and writing go on in threads while the model computes.

    Args:
        explainer: the pipeline.
        finished: shards, from `folder.finished`.
        advance: called with the number of images of each batch that is explained.

    Returns:
        Of each shard that was written: its images, and how many of them are errors.

    Raises:
        Unwritable: If there is no space, or no permission.
    """

    def all_rows() -> Iterator[Explained]:
        for batch in prepared_batches(pool, explainer, work.rows(finished), batch_size):
            yield from explained(explainer, batch)
            advance(len(batch))

    behind: tuple[Future, int] | None = None
    pool = ThreadPoolExecutor(num_workers())
    with ThreadPoolExecutor(1) as writer:  # which ends what it has begun, whatever happens
        try:
            for unit, group in groupby(all_rows(), key=lambda pair: pair[0].unit):
                images = [records for _, records in group]
                if behind is not None:
                    yield behind[0].result(), behind[1]
                behind = writer.submit(folder.write, unit, images), sum("error" in records[0] for records in images)
            if behind is not None:
                yield behind[0].result(), behind[1]
        finally:
            pool.shutdown(cancel_futures=True)
