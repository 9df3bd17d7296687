"""LibraGrad's backward rules for whatever an unmodified classifier computes (Mehri et al., arXiv 2411.16760, 3.5).

They act on tensor operations, not on modules: there, norms, gates and products look alike in every class. Values stay
as they are; gradients are as if what stands in brackets were constant:

* attention, [softmax(Q K^T)] V;
* gated activations, such as GELU and SiLU, x * [gate(x)], also where a sigmoid, tanh or erf is written out;
* LayerNorm, (x - mean) / [deviation]; and, by Corollary 2, every division, as where an embedding is brought to unit
  length;
* of an activation that is a gate by itself, such as tanh, all: what it leads to is a constant of its token;
* of a product of two branches, as in SwiGLU, each takes half the gradient (Theorem 4).

What is left is affine in the tokens: input times gradient, of the tokens and of all that is added to them, such as
biases, sums to the output ("FullGrad-complete", Theorems 1 to 3). Whatever else a model computes has its own gradient
and breaks that, which tells.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Names of functions and of methods, without underscores: `x * y` is Tensor.mul, `x *= y` is Tensor.mul_.
_GATES = {"softmax", "sigmoid", "tanh", "erf", "sqrt", "rsqrt", "reciprocal", "rdiv"}
_SCALED = {"gelu", "silu", "rms_norm", "normalize"}  # their first argument times something
_PRODUCTS, _SUMS = {"mul", "matmul", "bmm"}, {"add", "sub", "rsub"}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients inside the block, so that what does depends on the images."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _depends(value: Any) -> bool:
    """Whether a value depends on the images."""
    return isinstance(value, Tensor) and value.requires_grad


def _swap(value: Tensor, path: Tensor) -> Tensor:
    """A value with the gradient of another: the paper's SwapBackward (3.4)."""
    return value.detach() + (path - path.detach()).to(value.dtype)


class Balanced(TorchFunctionMode):
    """While active, gradients follow these rules, and `constants` lists what is added to what depends on the images.

    Each entry is the sum and the constant in it, of a shape that broadcasts to the sum's. No parameter may require
    gradients meanwhile: see `frozen`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.constants: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not any(_depends(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):  # of query, key, value
            args = (args[0].detach(), args[1].detach(), *args[2:])
        elif name == "div" and len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], args[1].detach(), *args[2:])
        elif name in _SCALED:
            return self._scaled(func, *args, **kwargs)
        output = func(*args, **kwargs)
        if not _depends(output):
            return output
        if name in _GATES and output.ndim > 2:  # those of (B, C) are a head's, which end the model and scale nothing
            return output.detach()
        if name in _PRODUCTS and all(map(_depends, args[:2])):
            output.register_hook(lambda slope: slope / 2)
        elif name in _SUMS and not all(map(_depends, args[:2])):
            self._note(output, func(*(torch.zeros_like(a) if _depends(a) else a for a in args), **kwargs))
        elif name == "linear":
            self._note(output, args[2] if len(args) > 2 else kwargs.get("bias"))
        return output

    def _scaled(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """f(x) as x * [f(x) / x]."""
        kwargs.pop("inplace", None)
        given = input.detach()
        near = given.masked_fill(given == 0, torch.finfo(given.dtype).eps)  # 0 / 0 otherwise
        return _swap(func(given, *args, **kwargs), input * (func(near, *args, **kwargs) / near))

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        value, _, reciprocal = torch.native_layer_norm(input.detach(), normalized_shape, weight, bias, eps)
        path = (input - input.mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)) * reciprocal
        output = _swap(value, path if weight is None else path * weight)
        self._note(output, bias)
        return output

    def _note(self, output: Tensor, constant: Tensor | None) -> None:
        if constant is not None and output.ndim <= 3:  # a mask of (B, heads, T, T) is added inside the brackets
            self.constants.append((output, constant))
