"""Trace a graph, write it in each format, and run what was written."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..classifiers.compiled import as_graph
from ..messages import sentence
from .graph import OUTPUTS, ExplanationGraph
from .metadata import CONFIG

# The first whose translation to ONNX was tried and found right; that of 2.6 fails.
TORCH = "2.13"
# What a written file gives for pixel_values, in the order of `OUTPUTS`.
Run = Callable[[np.ndarray], list[np.ndarray]]


def traced(graph: ExplanationGraph, pixel_values: torch.Tensor) -> ExportedProgram:
    """Trace a graph for batches of any size.

    Raises:
        ValueError: If what it does depends on values, on the size of the batch, or on what is not torch's.
    """
    try:
        return as_graph(graph, pixel_values)
    except ValueError as error:
        raise ValueError(
            f"{graph.classifier.name} cannot be traced as one graph ({error}); change what in it depends on values, "
            "fixes the size of a batch or leaves torch, or put another head on it by classifier.with_head."
        ) from error


def check_onnx() -> None:
    """Raise ImportError, with what to install, where ONNX files cannot be made."""
    if torch.__version__ < TORCH:
        raise ImportError(
            f"ONNX files need torch>={TORCH}, and this is {torch.__version__}; upgrade it, or export a .pt2."
        )
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX files need {error.name}: run `pip install tve_hf[export]`.") from error


def write_onnx(program: ExportedProgram, config: str, path: Path, name: str) -> None:
    """Write ONNX, with the weights in `path` and ".data" beside it where they have more than 2 GB.

    Raises:
        ValueError: If ONNX has no operator for a part of it.
    """
    try:
        # The fused kernels of a CPU have strides of their own, which the views of Swin's windows do not survive.
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns of what it calls itself
            converted = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                input_names=["pixel_values"],
                output_names=[*OUTPUTS],
            )
    except torch.onnx.OnnxExporterError as error:
        said = re.search(r"<class '[\w.]+'>: (.*)", str(error))
        reason = (said[1] if said else sentence(error)).split(". ")[0].rstrip(".")
        raise ValueError(
            f"{name} cannot be translated to ONNX ({reason}); export it as a .pt2 file, which torch runs."
        ) from error
    assert converted is not None  # as with dynamo=True it never is
    converted.model.metadata_props[CONFIG] = config
    converted.save(path)


def run_onnx(path: Path) -> Run:
    """Load a file into onnxruntime, on the CPU.

    Raises:
        ValueError: If it lacks an operator for the precision, as for convolutions in bfloat16.
    """
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, NotImplemented

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, NotImplemented) as error:
        reason = sentence(error).rpartition("This is an invalid model. ")[2].rstrip(".")
        raise ValueError(
            f"onnxruntime cannot run {path.name} ({reason}); export it in float32 or float16, or as a .pt2 file."
        ) from error
    return lambda pixel_values: session.run([*OUTPUTS], {"pixel_values": pixel_values})


def write_pt2(program: ExportedProgram, config: str, path: Path, name: str) -> None:
    """Write what `torch.export.load` reads, with the config among its extra files."""
    torch.export.save(program, path, extra_files={CONFIG: config})


def run_pt2(path: Path) -> Run:
    """Load a file into torch, on the device that it was traced on."""
    module = torch.export.load(path).module()

    def run(pixel_values: np.ndarray) -> list[np.ndarray]:
        device = next(module.parameters()).device
        with torch.no_grad():
            return [output.cpu().numpy() for output in module(torch.from_numpy(pixel_values).to(device))]

    return run
