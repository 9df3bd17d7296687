"""Whether looking at a model has changed it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def state_of(model: nn.Module) -> dict:
    """Everything about a model that looking at it must not change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {(n, h): list(getattr(m, h).items()) for n, m in model.named_modules() for h in hooks},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "identity": {name: id(t) for name, t in model.state_dict(keep_vars=True).items()},
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
    }


@contextmanager
def left_as_found(model: nn.Module, but_the_generator: bool = False) -> Iterator[None]:
    """Assert that the body of a with-block changes nothing about a model, nor the global random generator."""
    state, tensors = state_of(model), {name: t.clone() for name, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    yield
    assert state_of(model) == state
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
    assert but_the_generator or torch.equal(torch.get_rng_state(), rng)
