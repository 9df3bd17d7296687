"""Count what an explanation costs: passes of the classifier, what an explainer computes, memory and time."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..classifiers import SplitClassifier
from ..classifiers.compiled import CompiledBackbone
from ..classifiers.parts import Backbone
from ..classifiers.tracing import first_tensor, hooked


@dataclass
class Cost:
    """What an explanation costs: seconds, and images that went through the classifier forwards and backwards."""

    seconds: float = 0.0
    forward: int = 0
    backward: int = 0

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.tensor(float(value)) for name, value in vars(self).items()}


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made and not yet freed in a with-block, `now`, and the most there were, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What was there before counts for nothing, nor do views of it.
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._known.update(tensor.untyped_storage()._cdata for tensor in given)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def own_share(classifier: SplitClassifier, explain: Callable[[Tensor], Any]) -> float:
    """What an explanation computes beside one pass of the classifier, in such passes.

    Counted are the floating-point operations of matrix products, convolutions and attention, for one image.

    Args:
        explain: a method that takes one pass, of pixel_values (1, 3, H, W).
    """
    pixel_values = classifier.probe()[:1]
    with torch.no_grad(), FlopCounterMode(display=False) as one_pass:
        classifier(pixel_values)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        explain(pixel_values)
    return whole.get_total_flops() / max(1, one_pass.get_total_flops()) - 1


@contextmanager
def counting(backbone: Backbone) -> Iterator[Cost]:
    """Count the passes of a classifier, compiled ones too, and the time, inside a with-block.

    A backward pass is one that reaches the input of its head, from whichever logits it started.
    """
    cost = Cost()
    running = False  # the head may also be applied alone, to embeddings of an earlier pass

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal running
        running = True
        images = first_tensor((*args, *kwargs.values()))
        cost.forward += 0 if images is None else len(images)

    def watch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal running
        embeddings = first_tensor((*args, *kwargs.values()))
        if running and embeddings is not None and embeddings.requires_grad:
            number = len(embeddings)

            def count_backward(gradient: Tensor) -> None:
                cost.backward += number

            embeddings.register_hook(count_backward)
        running = False

    def hooks() -> Iterator[Any]:
        yield backbone.model.register_forward_pre_hook(count, with_kwargs=True)
        if isinstance(backbone, CompiledBackbone):
            yield backbone.compiled_pass.register_forward_pre_hook(count, with_kwargs=True)
        for name in backbone.head_names[:1]:  # all heads are reached by one pass
            yield backbone.model.get_submodule(name).register_forward_pre_hook(watch, with_kwargs=True)

    with hooked(hooks()):
        wait_for_device()
        start = time.perf_counter()
        yield cost
        wait_for_device()
        cost.seconds = time.perf_counter() - start


def wait_for_device() -> None:
    """Let what is queued on a GPU end, before a clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
