"""Split a zero-shot model: its image tower is the backbone G, and what its text tower makes of prompts is a head H_t.

So one explainer of the image tower explains any prompt: another prompt is only another head.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import Backbone, HeadPart
from .prompts import TextTower, pooled, sentences_of
from .search import differ, find_features, find_layouts
from .tracing import hooked, probe_like, trace

# Of different lengths; their logits are compared with the model's own.
_SENTENCES = ("a cat", "two dogs on a chair")
# As many of the user's prompts are compared too; more would only repeat it.
_MAX_COMPARED = 64


def takes_prompts(model: nn.Module) -> bool:
    """Whether a model offers an image tower and a text tower that can be run one without the other."""
    return all(callable(getattr(model, name, None)) for name in ("get_image_features", "get_text_features"))


class ImageTower(nn.Module):
    """The image tower of a zero-shot model, as if it were a classifier whose logits are the embedding, (B, D).

    That is the projected embedding, before it is brought to unit length. Only the modules that take part are
    submodules here, under their own names; text tower and scale belong to the head.

    Args:
        model: the whole zero-shot model.
        inputs: images, as it takes them.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor]):
        super().__init__()
        self.config = model.config
        self.set_attn_implementation = getattr(model, "set_attn_implementation", None)
        self.read: Callable[..., Any] = model.get_image_features
        for name in _outermost_calls(model, lambda: self.read(**inputs)):
            self.add_module(name.replace(".", "_"), model.get_submodule(name))
        self.embedding = nn.Identity()
        self.train(model.training)

    def forward(self, pixel_values: Tensor, **inputs: Tensor) -> Tensor:
        return self.embedding(pooled(self.read(pixel_values=pixel_values, **inputs)))


def _outermost_calls(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Names of the modules that are called while `run` runs, without those inside another one of them."""
    called: list[str] = []

    def hooks() -> Iterator[Any]:
        for name, module in model.named_modules():
            if name:
                yield module.register_forward_pre_hook(lambda *_, name=name: called.append(name))

    with hooked(hooks()), torch.no_grad():
        run()
    return [name for name in dict.fromkeys(called) if not any(name.startswith(f"{other}.") for other in called)]


@torch.no_grad()
def split_towers(
    model: Any, processor: Any, name: str, labels: Sequence[str], templates: Sequence[str]
) -> tuple[Backbone, TextTower]:
    """Split a zero-shot model into the backbone of its image tower and its text tower.

    How it scales cosines is found on noise, and accepted only if that gives its own `logits_per_image` for other noise
    and the prompts.

    Args:
        model: in eval mode; `takes_prompts`.
        processor: its processor, with tokenizer and image processor.
        name: of the model, for messages.
        labels, templates: the prompts, as `check_prompts` returns them.

    Raises:
        ValueError: If the processor lacks one of both, or the logits are not made from cosines.
    """
    tokenizer, image_processor = (getattr(processor, part, None) for part in ("tokenizer", "image_processor"))
    if tokenizer is None or image_processor is None:
        raise ValueError(
            f"{name} reads images and prompts, but {type(processor).__name__} has no "
            f"{'tokenizer' if tokenizer is None else 'image processor'}; pass the model's processor, "
            "AutoProcessor.from_pretrained(...), as image_processor=."
        )
    probe = probe_like(model, image_processor)
    tower = ImageTower(model, probe)
    embeddings, calls = trace(tower, **probe)
    part = HeadPart("embedding", input_shape=tuple(embeddings.shape[1:]))
    layouts = find_layouts(calls, probe["pixel_values"])
    feature_names = find_features(calls, [part.name], layouts, probe["pixel_values"])
    backbone = Backbone(tower, [part], feature_names, tuple(probe)[1:], layouts)
    del calls
    text = TextTower(model, tokenizer, name)
    text.scale, text.bias = _find_scale(model, text, embeddings, _own_logits(model, text, _SENTENCES, probe))

    sentences = (*_SENTENCES, *sentences_of(labels, templates)[:_MAX_COMPARED])
    other = probe | {"pixel_values": probe["pixel_values"].flip(-1).roll(1, 0)}
    ours = text.head(sentences, ("{}",))(backbone(**other).embeddings)
    if differ(ours, _own_logits(model, text, sentences, other)):
        raise _not_a_cosine(name)
    return backbone, text


def _own_logits(model: nn.Module, text: TextTower, sentences: Sequence[str], inputs: dict[str, Tensor]) -> Tensor:
    """The whole model's logits_per_image of sentences, (B, S)."""
    logits = getattr(model(**text.tokens(sentences), **inputs), "logits_per_image", None)
    if logits is None:
        raise _not_a_cosine(text.name)
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"{text.name} gives NaN or infinite logits for plain noise: download or train it again, or load it in "
            "float32."
        )
    return logits


def _find_scale(model: nn.Module, text: TextTower, embeddings: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Find which scalar of the model, and which function of it, turns cosines into logits, and which one is a bias.

    Scalars are the outermost parameters of a single value. Of two, one is the bias, even while it is 0.
    """
    cosines = F.normalize(embeddings, dim=-1) @ text.embed(_SENTENCES).to(embeddings.dtype).T
    single = {name: weight.reshape(()).clone() for name, weight in model.named_parameters() if weight.numel() == 1}
    outermost = min((name.count(".") for name in single), default=0)
    scalars = [weight for name, weight in single.items() if name.count(".") == outermost]
    for scalar, bias in [*permutations(scalars, 2), *((scalar, None) for scalar in scalars)]:
        for scale in (scalar.exp(), 1 / scalar, scalar):
            ours = scale * cosines if bias is None else scale * cosines + bias
            if not differ(ours, logits):
                return scale, bias
    raise _not_a_cosine(text.name)


def _not_a_cosine(name: str) -> ValueError:
    return ValueError(
        f"Cannot split {name}: it gives no logits_per_image that are a scaled cosine, plus a bias, of one embedding "
        "of the image and one of the text; pass a model such as CLIP or SigLIP."
    )
