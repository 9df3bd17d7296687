"""Backbone G and head H_t of any image classifier, found by looking at what it does: f = H_t o G."""

from .model import SplitClassifier
from .split import split_classifier

__all__ = ["SplitClassifier", "split_classifier"]
