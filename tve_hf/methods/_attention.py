"""Where an unmodified classifier attends, found without knowing its class, and its attention in one pass.

The block of an attention module is the member of a list that it stands in; an attentional pooler comes after the last
block, with queries that are none of its tokens. Which tokens the embedding is read from is found by its gradient.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classifiers import SplitClassifier
from ..classifiers.tracing import first_tensor, hooked
from ..patches import token_grid
from ._gradients import check_differentiable, differentiable
from ._weights import Recorder, eager_attention


@dataclass(frozen=True)
class Layout:
    """Where a classifier attends.

    Args:
        attentions: names of the attention modules of its blocks, in order; only the last unless all were asked for.
        blocks: names of those blocks.
        pooler: name of the attentional pooler that makes the embedding, if one does.
        prefix: tokens before those of the patches.
        rows, columns: of the patch tokens.
        queries: the tokens whose rows of attention count: the prefix tokens that the embedding is read from, such as
            the class token and, beside it, one of distillation; where there are none, the tokens that are pooled.
        inputs: what the model has to be given for its modules to return weights.
    """

    attentions: tuple[str, ...]
    blocks: tuple[str, ...]
    pooler: str | None
    prefix: int
    rows: int
    columns: int
    queries: tuple[int, ...]
    inputs: dict[str, bool]

    def query_rows(self, attention: Tensor) -> Tensor:
        """Mean of the rows of `queries`, (B, T, T) -> (B, T)."""
        return attention[:, list(self.queries)].mean(1)

    def on_grid(self, values: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Values of tokens on the grid, bilinearly resampled, (B, T) -> (B, rows, cols)."""
        patches = values[:, self.prefix :].unflatten(1, (1, self.rows, self.columns))
        return F.interpolate(patches.float(), size=grid_size, mode="bilinear", align_corners=False).squeeze(1)

    def accumulated(self, weighted: Sequence[Tensor]) -> Tensor:
        """Row of `queries` of R, where R <- R + mean_heads(ReLU(W)) R over the blocks, from R = I, (B, T).

        Args:
            weighted: W of each block, (B, heads, T, T), and last that of the pooler, if there is one, which ends with
                mean_heads(ReLU(W)) R: its queries are none of the tokens.
        """
        steps = [w.float().relu().mean(1) for w in weighted]
        pooled = steps.pop() if self.pooler else None
        relevance = torch.eye(steps[0].shape[-1], device=steps[0].device).expand_as(steps[0])
        for step in steps:
            relevance = relevance + step @ relevance
        return self.query_rows(relevance) if pooled is None else (pooled @ relevance).mean(1)


@dataclass
class Attended:
    """One pass: logits (B, C), embeddings (B, D), and the attention of blocks (B, heads, T, T) and of a pooler."""

    logits: Tensor
    embeddings: Tensor
    maps: list[Tensor]
    pooled: Tensor | None  # (B, heads, queries, T)

    def maps_from(self, start_layer: int, name: str) -> list[Tensor]:
        """Maps of the blocks from this one on, negative from the end, and of the pooler; `name` is the classifier's.

        Raises:
            ValueError: If there is no such block.
        """
        count = len(self.maps)
        if not -count <= start_layer < count:
            raise ValueError(f"start_layer={start_layer} is none of the {count} blocks of {name}.")
        return self.maps[start_layer:] + ([] if self.pooled is None else [self.pooled])


def replace_first(output: Any, tensor: Tensor) -> Any:
    """A module's output with its first tensor replaced."""
    if isinstance(output, Tensor):
        return tensor
    if type(output) is tuple:
        return (tensor, *output[1:])
    raise ValueError(f"A block returns {type(output).__name__}, not a tensor or tuple; this method cannot serve it.")


def attend(classifier: SplitClassifier, pixel_values: Tensor, layout: Layout, hooks: Iterable[Any] = ()) -> Attended:
    """Run the classifier once and return its attention; `hooks` are active meanwhile, and removed after."""
    model = classifier.backbone.model
    recorder = Recorder()
    names = [*layout.attentions, *([layout.pooler] if layout.pooler else [])]
    own = (recorder.hook(model.get_submodule(name), name) for name in names)
    with eager_attention(model), hooked(chain(hooks, own)), recorder:
        output = classifier.reading(())(pixel_values, **layout.inputs)
    attention = dict(recorder.seen)
    pooled = attention[layout.pooler] if layout.pooler else None
    return Attended(output.logits, output.embeddings, [attention[name] for name in layout.attentions], pooled)


Slopes = dict[int, Tensor]  # gradient of the embedding by a tensor, by the tensor's id


def _observe(
    classifier: SplitClassifier, pixel_values: Tensor, inputs: dict[str, bool]
) -> tuple[list[tuple[str, Tensor]], dict[str, Tensor], Slopes]:
    """Run the classifier once; return all weights that reach its embedding, what members of lists return, and slopes.

    The slopes are along a random direction: along (1, ..., 1) a LayerNorm would have none.
    """
    model = classifier.backbone.model
    recorder = Recorder()
    outputs: dict[str, Tensor] = {}

    def hooks() -> Iterator[Any]:
        for name, module in model.named_modules():
            yield recorder.hook(module, name)
            if name.rpartition(".")[2].isdigit():

                def keep(module: nn.Module, args: tuple, output: Any, name: str = name) -> None:
                    tokens = first_tensor(output)
                    if tokens is not None and tokens.ndim == 3:
                        outputs[name] = tokens

                yield module.register_forward_hook(keep)

    with differentiable(pixel_values) as x:
        with eager_attention(model), hooked(hooks()), recorder:
            embeddings = classifier(x, **inputs).embeddings
        direction = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0)).to(embeddings)
        wanted = [t for t in (*(weights for _, weights in recorder.seen), *outputs.values()) if t.requires_grad]
        gradients: tuple[Tensor | None, ...] = ()
        if wanted and embeddings.requires_grad:
            gradients = torch.autograd.grad((embeddings * direction).sum(), wanted, allow_unused=True)
    slopes = {id(tensor): slope for tensor, slope in zip(wanted, gradients, strict=False) if slope is not None}
    return [(name, weights) for name, weights in recorder.seen if id(weights) in slopes], outputs, slopes


# By the size of the images, whether every block is read, and the head: what was found of each model.
_LAYOUTS: WeakKeyDictionary[nn.Module, dict[tuple, Layout]] = WeakKeyDictionary()


def find_layout(classifier: SplitClassifier, pixel_values: Tensor, every_block: bool = True) -> Layout:
    """Find where a classifier attends, by a pass over the first image and the gradient of its embedding.

    It is found once for each model and size of images.

    Args:
        every_block: whether the method reads all blocks, and not only the last.

    Raises:
        ValueError: If no module attends from all tokens to all tokens, or, under `every_block`, not every block does;
            or under inference mode.
    """
    check_differentiable()  # also where nothing has to be found
    found = _LAYOUTS.setdefault(classifier.backbone.model, {})
    key = (*pixel_values.shape[-2:], every_block, *classifier.backbone.head_names)
    if key not in found:
        found[key] = _find(classifier, pixel_values[:1], every_block)
    return found[key]


def _find(classifier: SplitClassifier, pixel_values: Tensor, every_block: bool) -> Layout:
    inputs: dict[str, bool] = {}
    used, outputs, slopes = _observe(classifier, pixel_values, inputs)
    option = "output_attentions"  # without which some older classes return no weights
    if not used and option in inspect.signature(classifier.backbone.model.forward).parameters:
        with suppress(ValueError):  # some say that they have none to return
            used, outputs, slopes = _observe(classifier, pixel_values, {option: True})
            inputs = {option: True}
    is_pooler = len(used) > 1 and used[-1][1].shape[-1] != used[-1][1].shape[-2]
    pooler = used.pop() if is_pooler else None
    num_tokens = used[-1][1].shape[-1] if used else 0
    maps = used if every_block else used[-1:]
    blocks = [_block_of(name, outputs, num_tokens) for name, _ in maps]
    grid = token_grid(num_tokens, *pixel_values.shape[-2:])
    whole = all(len(weights) == 1 and weights.shape[-2:] == (num_tokens, num_tokens) for _, weights in maps)
    # Fewer queries than keys: the tokens after it are not patches, but summaries of them.
    whole = whole and all(weights.shape[-2] >= weights.shape[-1] for _, weights in used)
    whole = whole and (pooler is None or pooler[1].shape[-1] == num_tokens)
    slope = slopes.get(id(outputs[blocks[-1]])) if blocks and blocks[-1] else None
    if grid is None or not whole or None in blocks or len({*blocks}) < len(blocks) or slope is None:
        raise ValueError(
            f"{classifier.name} has no attention of a class token to all patches, or among them, "
            f"in {'every' if every_block else 'its last'} block, which this method reads; use another, such as tve, "
            "exact or grad_cam."
        )
    prefix, rows, columns = grid
    read = slope[0].abs().amax(-1).nonzero().flatten().tolist()
    return Layout(
        attentions=tuple(name for name, _ in maps),
        blocks=tuple(block for block in blocks if block),
        pooler=pooler[0] if pooler else None,
        prefix=prefix,
        rows=rows,
        columns=columns,
        queries=tuple([token for token in read if token < prefix] or read),
        inputs=inputs,
    )


def _block_of(name: str, outputs: dict[str, Tensor], num_tokens: int) -> str | None:
    """The innermost member of a list around an attention module that returns the tokens."""
    around = name
    while around:
        if around in outputs and outputs[around].shape[1] == num_tokens:
            return around
        around = around.rpartition(".")[0]
    return None
