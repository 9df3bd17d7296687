"""Attention maps of unmodified classes, read by hooks where the model computes them, inside the graph.

Nothing is known by name. A module attends if it returns, beside its output, weights (B, heads, queries, keys); its
block is the member of a list that it stands in; an attentional pooler is one whose weights are not square. What the
embedding is read from is found by its gradient.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..classifiers import SplitClassifier
from ..parts import SplitClassifierOutput
from ..patches import token_grid
from ..splitting import first_tensor, hooked
from ._gradients import differentiable


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


@dataclass
class Attended:
    """One pass: the classifier's output, the attention of its blocks (B, heads, T, T), and of its pooler."""

    output: SplitClassifierOutput
    maps: list[Tensor]
    pooled: Tensor | None  # (B, heads, queries, T)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """All configs that any module of the model holds, and those inside them, once each."""
    waiting = [v for module in model.modules() for v in vars(module).values() if isinstance(v, PreTrainedConfig)]
    found: dict[int, PreTrainedConfig] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]
    return list(found.values())


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Compute attention weights explicitly inside the block: the fused kernels never hold them.

    Every config is set and restored by itself: `set_attn_implementation` misses configs that only a submodule keeps,
    and overwrites differences between them.
    """
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = "eager"  # the property would recurse into the configs inside
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def _explicit_attention(module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | None:
    """Run torch's attention again with weights that its output depends on; its own are a copy beside the graph."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    if module.bias_k is not None or module.add_zero_attn or given["value"].ndim != 3:
        return None
    given |= {"need_weights": True, "average_attn_weights": False}
    weights = module.forward(**given)[1]  # (B, heads, Q, T)
    value = given["value"] if module.batch_first else given["value"].transpose(0, 1)
    weight = module.v_proj_weight if module.in_proj_weight is None else module.in_proj_weight.chunk(3)[2]
    bias = None if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[2]
    value = F.linear(value, weight, bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    output = F.linear(mixed, module.out_proj.weight, module.out_proj.bias)
    return output if module.batch_first else output.transpose(0, 1), weights


def _record(module: nn.Module, name: str, seen: list[tuple[str, Tensor]]) -> Any:
    """Hook a module so that the weights it returns are appended to `seen`; the innermost module's name counts."""

    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if isinstance(module, nn.MultiheadAttention):
            output = _explicit_attention(module, args, kwargs) or output
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4 and not any(weights is known for _, known in seen):
            seen.append((name, weights))
        return output

    return module.register_forward_hook(record, with_kwargs=True)


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
    seen: list[tuple[str, Tensor]] = []
    names = [*layout.attentions, *([layout.pooler] if layout.pooler else [])]
    own = (_record(model.get_submodule(name), name, seen) for name in names)
    with eager_attention(model), hooked(chain(hooks, own)):
        output = classifier(pixel_values, **layout.inputs)
    found = dict(seen)
    pooled = found[layout.pooler] if layout.pooler else None
    return Attended(output, [found[name] for name in layout.attentions], pooled)


def find_layout(classifier: SplitClassifier, pixel_values: Tensor, every_block: bool = True) -> Layout:
    """Find where a classifier attends, by a pass over the first image and the gradient of its embedding.

    Args:
        every_block: whether the method reads all blocks, and not only the last.

    Raises:
        ValueError: If no module attends from all tokens to all tokens, or, under `every_block`, not every block does.
    """
    model = classifier.backbone.model
    seen: list[tuple[str, Tensor]] = []
    outputs: dict[str, Tensor] = {}

    def hooks() -> Iterator[Any]:
        for name, module in model.named_modules():
            yield _record(module, name, seen)
            if name.rpartition(".")[2].isdigit():

                def keep(module: nn.Module, args: tuple, output: Any, name: str = name) -> None:
                    tokens = first_tensor(output)
                    if tokens is not None and tokens.ndim == 3:
                        outputs[name] = tokens

                yield module.register_forward_hook(keep)

    # Classes from before attention interfaces return weights, and compute them, only when told to.
    takes = inspect.signature(model.forward).parameters
    inputs = {"output_attentions": True} if "output_attentions" in takes else {}
    with differentiable(pixel_values[:1]) as x:
        with eager_attention(model), hooked(hooks()):
            embeddings = classifier(x, **inputs).embeddings
        # A random direction: along (1, ..., 1) a LayerNorm would have no gradient.
        direction = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0)).to(embeddings)
        wanted = [tensor for tensor in (*(w for _, w in seen), *outputs.values()) if tensor.requires_grad]
        slopes: tuple[Tensor | None, ...] = ()
        if wanted and embeddings.requires_grad:
            slopes = torch.autograd.grad((embeddings * direction).sum(), wanted, allow_unused=True)
    slope_of = {id(tensor): slope for tensor, slope in zip(wanted, slopes, strict=False)}
    used = [(name, weights) for name, weights in seen if slope_of.get(id(weights)) is not None]
    maps = [(name, weights) for name, weights in used if weights.shape[-1] == weights.shape[-2]]
    poolers = [(name, weights) for name, weights in used if weights.shape[-1] != weights.shape[-2]]

    num_tokens = maps[-1][1].shape[-1] if maps else 0
    maps = maps if every_block else maps[-1:]
    blocks = [_block_of(name, outputs, num_tokens) for name, _ in maps]
    grid = token_grid(num_tokens, *pixel_values.shape[-2:])
    whole = all(len(weights) == 1 and weights.shape[-1] == num_tokens for _, weights in maps)
    slope = slope_of.get(id(outputs[blocks[-1]])) if blocks and blocks[-1] else None
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
        pooler=poolers[-1][0] if poolers else None,
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
