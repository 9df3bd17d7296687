"""Look through what a model is wrapped in: `torch.compile`, accelerate's device maps, quantisation, adapters."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, or the model itself."""
    return model.get_submodule("_orig_mod") if "_orig_mod" in model._modules else model


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` has wrapped a module in it, or compiled one in place."""
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules())


def full_name(model: nn.Module, name: str, model_name: str) -> str:
    """Return the name of the one module of this name, or whose name ends so where the model is in another or compiled.

    Raises:
        ValueError: If there is none, or several modules share that end.
    """
    full_names = {other.replace("_orig_mod.", ""): other for other, _ in model.named_modules()}
    matches = [name] if name in full_names else [other for other in full_names if other.endswith(f".{name}")]
    if len(matches) != 1:
        raise ValueError(f"{model_name} has no module {name!r} to read a feature map from; choose one it has.")
    return full_names[matches[0]]


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model as it was written for the length of a with-block, since compiled code skips new hooks."""
    if torch.compiler.is_compiling() or not is_compiled(model):
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate moves the inputs or weights of a model, as after `device_map`, so that it must stay put."""
    return any("_hf_hook" in module.__dict__ for module in model.modules())


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device that a model's inputs belong on, and the precision of its first floating-point weights."""
    devices = (getattr(module.__dict__.get("_hf_hook"), "execution_device", None) for module in model.modules())
    device = next((torch.device(device) for device in devices if device is not None), None)
    tensors = [*model.parameters(), *model.buffers()]
    if device is None:
        device = next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
    return device, next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def has_adapters(module: nn.Module) -> bool:
    """Whether a module is PEFT's stand-in for another one: that one with adapters, or a trained copy of it."""
    return ("base_layer" in module._modules and hasattr(module, "merge")) or (
        "original_module" in module._modules and hasattr(module, "unload_and_optionally_merge_module")
    )


def count_weights(module: nn.Module) -> int:
    """How many parameters a module and those in it hold, packed ones too."""
    return sum(sum(1 for _ in m.parameters(recurse=False)) + _is_packed(m) for m in module.modules())


def named_weights(model: nn.Module, without: Iterable[nn.Module] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors that a model computes with and saves, in the order of its `state_dict`.

    Offloaded ones are loaded for as long as they are looked at, quantised ones are dequantised, and a module with
    adapters gives what it would hold if the active ones were merged into it.

    Args:
        model: is left as it was.
        without: modules of the model to leave out, with what adapters add to them.

    Raises:
        ValueError: If a weight was never loaded.
    """
    parts = list(without)
    left_out = {id(module) for part in parts for module in part.modules()}

    def visit(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        if id(module) in left_out:
            return
        if has_adapters(module):
            if not any(id(inner) in left_out for inner in module.modules()):
                yield from visit(prefix, _merged(module))
            return
        with _loaded(module):
            for name, tensor in _own_weights(module):
                if tensor.is_meta:
                    raise ValueError(f"The weight {prefix}{name} was never loaded; load the model before this.")
                if _dequantized(tensor).is_floating_point():
                    yield prefix + name, _dequantized(tensor)
            for name, child in module._modules.items():  # twice where it has two names, as in a state_dict
                if child is not None:
                    yield from visit(f"{prefix}{name}.", child)

    yield from visit("", model)


def _is_packed(module: nn.Module) -> bool:
    """Whether its weights are no parameters, but what `weight()` returns, as those of torch's quantised layers."""
    return hasattr(module, "_packed_params") and callable(getattr(module, "weight", None))


def _own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights and saved buffers of a module, without those of the modules in it."""
    if _is_packed(module):
        layer: Any = module
        packed = {"weight": layer.weight(), "bias": layer.bias()}
        yield from ((name, tensor) for name, tensor in packed.items() if tensor is not None)
    else:
        yield from module.named_parameters(recurse=False)
        buffers = module.named_buffers(recurse=False)
        yield from ((name, buffer) for name, buffer in buffers if name not in module._non_persistent_buffers_set)


def _dequantized(tensor: Tensor) -> Tensor:
    """A plain tensor, where a quantised one or a subclass that quantises stands for it."""
    quantized = tensor.is_quantized or type(tensor).dequantize is not Tensor.dequantize
    return tensor.detach().dequantize() if quantized else tensor.detach()


@contextmanager
def _loaded(module: nn.Module) -> Iterator[None]:
    """Let accelerate load what it has offloaded of a module, as it does whenever the module runs."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None or not any(parameter.is_meta for parameter in module.parameters()):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


@torch.no_grad()
def _merged(module: nn.Module) -> nn.Module:
    """The module that would stand in the place of one with adapters if the active ones were merged; a copy."""
    with ExitStack() as stack:
        for inner in module.modules():
            stack.enter_context(_loaded(inner))
        hooks = [inner.__dict__["_hf_hook"] for inner in module.modules() if "_hf_hook" in inner.__dict__]
        layer: Any = copy.deepcopy(module, {id(hook): hook for hook in hooks})  # hooks may hold all offloaded weights
    if hasattr(layer, "unload_and_optionally_merge_module"):
        if layer.disable_adapters:
            return layer.original_module
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    elif not layer.disable_adapters and not layer.merged:
        layer.merge()
    return layer.get_base_layer()
