"""Export a pipeline: trace, write, run what was written beside the pipeline's own models, and only then keep it."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..classifiers.compiled import TOLERANCES
from ..files import check_replaceable, dumps
from ..pipeline_tve import TransferableAttributionPipeline
from .formats import Run, check_onnx, run_onnx, run_pt2, traced, write_onnx, write_pt2
from .graph import OUTPUTS, ExplanationGraph
from .metadata import describe


@dataclass(frozen=True)
class Format:
    """How a kind of file is written and run, and what must be installed."""

    write: Callable[[Any, str, Path, str], None]
    run: Callable[[Path], Run]
    check: Callable[[], None] = lambda: None


# By the end of a file's name.
FORMATS = {"onnx": Format(write_onnx, run_onnx, check_onnx), "pt2": Format(write_pt2, run_pt2)}


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        files: the graph, and its weights where these are too large for one file.
        config: what the graph carries as `config.json`; see `metadata.describe`.
        difference: the largest one between what the file gives and what the pipeline's models give, in float32 units
            of the outputs.
    """

    files: tuple[Path, ...]
    config: dict[str, Any]
    difference: float


def export(
    explain: TransferableAttributionPipeline,
    output: str | os.PathLike,
    format: str | None = None,
    top_k: int | None = None,
) -> Exported:
    """Write classifier, explainer and transfer as one graph, for batches of any size, in the pipeline's precision.

    ```python
    explain = pipeline("transferable-attribution", model=explainer, classifier=classifier, device="cpu")
    export(explain, "model.onnx", top_k=3)
    ```

    The graph takes normalised `pixel_values` (B, 3, H, W) and gives `logits` (B, C), `class_idx` (B, K), `score`
    (B, K), the probabilities of these classes, and `attribution` (B, K, rows, cols): float32 and int64, whatever it
    computes in. It carries what else is needed to use it as `config.json`.

    Args:
        explain: a pipeline with an explainer; its rule, prompts and classes for all calls are those of the graph.
        output: the file to write, over an older one.
        format: "onnx", or "pt2" for `torch.export.load`; by default as the file is named.
        top_k: explain the k most probable classes of each image; by default as the pipeline does.

    Raises:
        ValueError: If the models cannot be exported, or the graph gives something else than they do; no file is left.
        ImportError: If ONNX is not installed.
        OSError: If the file cannot be written.
    """
    output = Path(output)
    kind = format or output.suffix[1:]
    if kind not in FORMATS:
        raise ValueError(
            f"The format of {output} is {kind!r}; name the file .onnx or .pt2, or pass one of {', '.join(FORMATS)}."
        )
    FORMATS[kind].check()
    check_replaceable(output)
    graph = ExplanationGraph(explain, top_k).eval()
    config = describe(explain, graph)
    probe = graph.classifier.probe().float()
    output.parent.mkdir(parents=True, exist_ok=True)
    program = traced(graph, probe)
    # Beside its place under its own name, by which it also names a file of its weights.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
        written = Path(folder) / output.name
        FORMATS[kind].write(program, dumps(config), written, graph.classifier.name)
        difference = _checked(FORMATS[kind].run(written), graph, probe)
        files = sorted(Path(folder).iterdir(), reverse=True)  # the weights before the graph that reads them
        for path in files:
            os.replace(path, output.parent / path.name)
    return Exported(tuple(output.parent / path.name for path in files[::-1]), config, difference)


def _checked(run: Run, graph: ExplanationGraph, probe: Tensor) -> float:
    """The largest difference between a written file and its graph, on one image and on three.

    Raises:
        ValueError: If it is above the tolerance.
    """
    dtype = max((graph.classifier.dtype, graph.explainer.dtype), key=lambda dtype: TOLERANCES.get(dtype, 0))
    largest = 0.0
    for pixel_values in (probe[:1], torch.cat([probe, probe[:1].flip(-1)])):
        with torch.no_grad():
            expected = [output.cpu().numpy() for output in graph(pixel_values)]
        found = run(pixel_values.cpu().numpy())
        same = expected[1] == found[1]  # classes of nearly the same probability may change places
        for name, ours, theirs in zip(OUTPUTS, expected, found, strict=True):
            ours, theirs = (ours, theirs) if name == "logits" else (ours[same], theirs[same])
            if not ours.size:
                continue
            difference = float(np.abs(ours - theirs).max())
            if not difference <= TOLERANCES.get(dtype, 1e-4) * max(1, float(np.abs(ours).max())):
                raise ValueError(
                    f"The exported graph of {graph.classifier.name} gives other {name} than the pipeline, by "
                    f"{difference:.2g} for {len(pixel_values)} images; export it in the other format, or in float32."
                )
            largest = max(largest, difference)
    return largest
