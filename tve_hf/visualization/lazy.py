"""What a dict is made of whose values are drawn when they are first asked for."""

from collections.abc import MutableMapping
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    ReadingDict = dict[str, Any]
else:

    class ReadingDict(MutableMapping, dict):
        """A dict whose `get`, `items`, `values`, `pop` and the like read by its `__getitem__`."""


class Undrawn(Enum):
    """What stands in a result for a picture that nobody asked for yet; it stays itself when pickled."""

    YET = 0

    def __repr__(self) -> str:
        return "<drawn when asked for>"
