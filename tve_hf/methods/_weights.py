"""Attention weights of unmodified classes, read where the model computes them, inside the graph.

Models attend in three ways: eagerly, where a module returns the weights that it used; by torch's fused function; and
by `nn.MultiheadAttention`. The last two are written out while a `Recorder` is active: neither shows its weights.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """All configs that any module of the model holds, and those inside them, once each."""
    waiting = [v for module in model.modules() for v in vars(module).values() if isinstance(v, PreTrainedConfig)]
    configs: dict[int, PreTrainedConfig] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in configs:
            configs[id(config)] = config
            waiting += [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]
    return list(configs.values())


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
    inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    if module.bias_k is not None or module.add_zero_attn or inputs["value"].ndim != 3:
        return None
    inputs |= {"need_weights": True, "average_attn_weights": False}
    _, weights = module.forward(**inputs)  # (B, heads, Q, T)
    assert weights is not None
    value = inputs["value"] if module.batch_first else inputs["value"].transpose(0, 1)
    weight = module.v_proj_weight if module.in_proj_weight is None else module.in_proj_weight.chunk(3)[2]
    bias = None if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[2]
    value = F.linear(value, weight, bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    output = F.linear(mixed, module.out_proj.weight, module.out_proj.bias)
    return output if module.batch_first else output.transpose(0, 1), weights


class Recorder(TorchFunctionMode):
    """While active, records the attention weights, (B, heads, queries, keys), of the modules that it has hooked.

    They are in `seen`, with the name of the innermost hooked module that ended first after they were computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Tensor]] = []
        self._waiting: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._scaled_dot_product(*args, **kwargs)
        return func(*args, **kwargs)

    def _scaled_dot_product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention of encoders; what only decoders do is left to torch, and not recorded."""
        if is_causal or enable_gqa or dropout_p or query.ndim != 4:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            is_kept = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, -math.inf) if is_kept else logits + attn_mask
        self._waiting.append(logits.softmax(-1))
        return self._waiting[-1] @ value

    def hook(self, module: nn.Module, name: str) -> Any:
        """Hook a module; returns the handle."""

        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if isinstance(module, nn.MultiheadAttention):
                output = _explicit_attention(module, args, kwargs) or output
            returned = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(returned, Tensor) and returned.ndim == 4:
                self._waiting.append(returned)
            known = {id(weights) for _, weights in self.seen}
            self.seen += [(name, weights) for weights in self._waiting if id(weights) not in known]
            self._waiting.clear()
            return output

        return module.register_forward_hook(record, with_kwargs=True)
