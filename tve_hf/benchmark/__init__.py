"""Compare methods on held-out images: methods x images -> report, table and plots."""

from .run import EvaluateArguments, evaluate

__all__ = ["EvaluateArguments", "evaluate"]
