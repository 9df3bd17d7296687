"""Layer-wise relevance propagation (LRP) through whatever an unmodified classifier computes.

A `Tape` lists the tensor operations of a pass below modules and autograd: there, skip connections and the products of
attention, which are no modules, are seen in every class. Its walk back follows Chefer et al. (arXiv 2012.09838,
section 3), whose equations the rules name. What the paper leaves open is as in the authors' code
(hila-chefer/Transformer-Explainability, MIT licence): norms, softmax and elementwise functions pass relevance on as it
is, and biases take none. Beyond both, where a plain ViT has nothing of the kind:

* whatever else does not depend on the image, such as a bias of attention or a layer scale, takes none either;
* of a quotient the numerator takes all, as where an embedding is brought to unit length.

Sums of relevance in Eq. 9-10 are those of each image, so that a batch gives what its images give alone. Relevance of a
sum or product that is exactly 0 is dropped; the authors' code adds 1e-9 to denominators.

LRP is patented: it "can only be used free of charge for personal and scientific purposes", says the README of LXT,
Fraunhofer's own library for it. The licence of this package grants no rights to those patents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..classifiers import SplitClassifier
from ..classifiers.tracing import tensors_in

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm}
_MEANS = {_aten.mean, _aten.sum}
_SUMS = {_aten.add: 1, _aten.sub: -1}  # with the sign of what is added
_MOVES = {_aten.cat, _aten.stack, _aten._unsafe_view, _aten.index, _aten.index_select, _aten.repeat}
_PASSES = {_aten._softmax, _aten.native_layer_norm, _aten.native_group_norm, _aten._fused_rms_norm, _aten._to_copy}
_PASSES |= {_aten.as_strided_}  # how torch ends a mean over a map

Key = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


def _key(tensor: Tensor) -> Key:
    """What tells tensors apart while all are alive: autograd makes new objects of the same view."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _full(tensor: Tensor) -> Tensor:
    """A tensor apart from its graph, in float32 at least: ratios in half precision are too coarse."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _mapped(arguments: Sequence[Any], change: Callable[[Any], Any]) -> list[Any]:
    """Arguments, and those in lists among them, each changed."""
    return [
        [change(a) for a in argument] if isinstance(argument, list | tuple) else change(argument)
        for argument in arguments
    ]


@dataclass(frozen=True)
class _Place:
    """Stands among the arguments of a step for its operand of this number."""

    number: int


@dataclass
class _Step:
    """One operation of a pass; its operands are the tensors among its arguments that depend on the images."""

    func: Any
    arguments: list[Any]
    options: dict[str, Any]
    operands: list[Tensor]
    outputs: tuple[Tensor, ...]  # kept alive, as the operands are, so that no key stands for two tensors
    read: list[Key]  # of the operands, before the operation
    made: list[Key]

    @property
    def kind(self) -> Any:
        return self.func.overloadpacket

    def pull(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Gradients by the operands from those by the outputs."""
        operands = [_full(operand).requires_grad_() for operand in self.operands]
        arguments = _mapped(self.arguments, lambda a: operands[a.number] if isinstance(a, _Place) else a)
        with torch.enable_grad():
            outputs = tensors_in(self.func(*arguments, **self.options))
        used = [(output, slope) for output, slope in zip(outputs, gradients, strict=True) if slope is not None]
        return list(torch.autograd.grad([output for output, _ in used], operands, [slope for _, slope in used]))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Their quotient, and 0 where the denominator is."""
    empty = denominator == 0
    return (numerator / denominator.masked_fill(empty, 1)).masked_fill(empty, 0)


def _through_weights(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """Eq. 5: x takes the relevance of x @ weight by its contributions above 0."""
    up, down, weight_up, weight_down = x.clamp(min=0), x.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
    share = _ratio(relevance, up @ weight_up + down @ weight_down)
    return up * (share @ weight_up.mT) + down * (share @ weight_down.mT)


def _through_attention(left: Tensor, right: Tensor, relevance: Tensor) -> list[Tensor]:
    """Eq. 7 of left @ right, and Eq. 9-10, which give each a half: by Eq. 7 each would take all of it."""
    share = _ratio(relevance, left @ right) / 2
    return [left * (share @ right.mT), right * (left.mT @ share)]


def _through_sum(parts: Sequence[Tensor], relevance: Tensor, batch: int | None) -> list[Tensor]:
    """Eq. 7 of a sum of two and, given the number of images, Eq. 9-10."""
    share = _ratio(relevance, parts[0] + parts[1])
    taken = [(part * share).sum_to_size(part.shape) for part in parts]
    if batch is None:
        return taken
    whole, *totals = (t.reshape(batch, -1).sum(1, keepdim=True) for t in (relevance, *taken))  # (batch, 1) each
    factor = _ratio(whole, totals[0].abs() + totals[1].abs())
    scaled = [t.reshape(batch, -1) * factor * total.sign() for t, total in zip(taken, totals, strict=True)]
    return [t.view_as(part) for t, part in zip(scaled, parts, strict=True)]


class Tape(TorchDispatchMode):
    """While active, notes what is computed from these images, (B, 3, H, W); `relevance` walks it back."""

    def __init__(self, classifier: SplitClassifier, pixel_values: Tensor):
        super().__init__()
        self._name, self._images = classifier.name, pixel_values
        self._known, self._steps = {_key(pixel_values)}, list[_Step]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        operands: list[Tensor] = []

        def place(argument: Any) -> Any:
            if not isinstance(argument, Tensor) or _key(argument) not in self._known:
                return argument
            operands.append(argument)
            return _Place(len(operands) - 1)

        arguments = _mapped(args, place)
        read = [_key(operand) for operand in operands]
        output = func(*args, **(kwargs or {}))
        outputs = tensors_in(output)
        made = [_key(tensor) for tensor in outputs]
        if operands and not (func.is_view and made == read):  # as that of detach
            self._steps.append(_Step(func, arguments, kwargs or {}, operands, outputs, read, made))
            self._known.update(made)
        return output

    @torch.no_grad()
    def relevance(
        self, logits: Tensor, class_idx: Tensor, wanted: Sequence[Tensor], normalize: bool = True
    ) -> list[Tensor]:
        """Relevance of tensors of the pass: that of each image's class is 1 at first, and of its other classes 0.

        Args:
            logits: of the pass, (B, C).
            class_idx: (B,).
            normalize: whether sums follow Eq. 9-10; LRP as it was before stops at Eq. 7.

        Returns:
            One for each tensor wanted, of its shape, float32 at least.

        Raises:
            ValueError: If relevance would have to pass an operation that has no rule.
        """
        relevances = {_key(tensor): torch.zeros_like(_full(tensor)) for tensor in wanted}
        held = {_key(logits): torch.zeros_like(_full(logits)).scatter(1, class_idx.unsqueeze(1), 1)}
        first = min(
            (i for i, step in enumerate(self._steps) if not relevances.keys().isdisjoint(step.made)), default=0
        )
        for step in self._steps[:first:-1]:
            relevance = [held.pop(key, None) for key in step.made]
            if step.func._schema.is_mutable and step.kind not in _PASSES:  # earlier steps would see its values
                raise self._refusal(step)
            if all(part is None for part in relevance):
                continue
            for key, share in zip(step.read, self._shares(step, relevance, normalize), strict=True):
                if share is not None:
                    held[key] = held[key] + share if key in held else share
            relevances |= {key: held[key] for key in relevances.keys() & held.keys()}
        return [relevances[_key(tensor)] for tensor in wanted]

    def _shares(self, step: _Step, relevance: Sequence[Tensor | None], normalize: bool) -> Sequence[Tensor | None]:
        """Share the relevance of what a step made among its operands; None for one that takes no part."""
        kind, count = step.kind, len(step.operands)
        if step.func.is_view or kind in _MOVES:
            return step.pull(relevance)
        whole, operands = relevance[0], [_full(operand) for operand in step.operands]
        assert whole is not None
        if kind in _MEANS:  # Eq. 2
            return [operands[0] * step.pull([_ratio(whole, _full(step.outputs[0]))])[0]]
        if kind in _PRODUCTS and not any(isinstance(argument, _Place) for argument in step.arguments[:-2]):
            left, right = (operands[a.number] if isinstance(a, _Place) else _full(a) for a in step.arguments[-2:])
            if count == 2:
                return _through_attention(left, right, whole)
            if isinstance(step.arguments[-2], _Place):
                return [_through_weights(left, right, whole)]
            return [_through_weights(right.mT, left.mT, whole.mT).mT]
        if kind in _SUMS and count == 2:
            added = operands[1] * _SUMS[kind] * step.options.get("alpha", 1)
            return _through_sum([operands[0], added], whole, len(self._images) if normalize else None)
        if kind is _aten.mul and count == 2:
            return [(whole / 2).sum_to_size(operand.shape) for operand in operands]
        if kind is _aten.div and count == 2:
            return [whole.sum_to_size(operands[0].shape), None]
        if count == 1 and (kind in _PASSES or torch.Tag.pointwise in step.func.tags):
            return [whole.sum_to_size(operands[0].shape)]
        raise self._refusal(step)

    def _refusal(self, step: _Step) -> ValueError:
        return ValueError(
            f"{self._name} computes {step.func}, through which this method cannot pass relevance; use another, such "
            "as attention_cam."
        )
