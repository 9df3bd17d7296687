"""Classifier, explainer and transfer as one graph in a file: ONNX, or a program of `torch.export`."""

from .graph import OUTPUTS, ExplanationGraph
from .run import Exported, export

__all__ = ["OUTPUTS", "ExplanationGraph", "Exported", "export"]
