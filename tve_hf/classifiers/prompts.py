"""Prompts as a classifier's head H_t: the text tower of a zero-shot model embeds them, cosines are the logits."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HYPOTHESIS_TEMPLATE = "This is a photo of {}."  # as in transformers' pipeline for zero-shot image classification
# Sentences in one pass of the text tower: the bound on memory.
_CHUNK = 256


class PromptHead(nn.Module):
    """H_t(e)_c = scale * cos(e, t_c) + bias for the embeddings t_c of prompts, (..., D) -> (..., C).

    Args:
        text_embeddings: t, of unit length, (C, D), C = len(labels).
        scale, bias: the model's; no bias if None.
        labels: the candidate labels as the user wrote them; none until there are prompts.
        templates: the sentences that they were put in.
        name: of the model, for messages.
    """

    def __init__(
        self,
        text_embeddings: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        labels: tuple[str, ...],
        templates: tuple[str, ...],
        name: str,
    ):
        super().__init__()
        self.text_embeddings: Tensor
        self.scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("text_embeddings", text_embeddings)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.labels = labels
        self.templates = templates
        self.name = name

    def forward(self, embeddings: Tensor) -> Tensor:
        if not self.labels:
            raise ValueError(
                f"{self.name} is a zero-shot model, whose classes are what prompts say; pass candidate_labels, such "
                "as ['a cat', 'a dog']."
            )
        logits = F.normalize(embeddings, dim=-1) @ self.text_embeddings.T * self.scale
        return logits if self.bias is None else logits + self.bias


class TextTower(nn.Module):
    """The text side of a zero-shot model, which makes heads of prompts.

    Args:
        model: the whole zero-shot model.
        tokenizer: its own.
        name: of the model, for messages.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
        self.scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("bias", None)
        # A tower that reads its last token, as SigLIP's does, gives another embedding if padding is added: it was
        # trained on sentences that are all padded to the same length. Others are padded as little as possible.
        self.pad_to: int | None = None
        loose, self.pad_to = self.embed(["a"]), min(self.max_length, 64)
        depends = (self.embed(["a"]) - loose).norm() > 0.05  # of unit vectors; more than bfloat16 rounds
        self.pad_to = self.max_length if depends else None

    @property
    def sigmoid(self) -> bool:
        """Whether every prompt is a question of its own.

        Under a softmax, a bias that all logits share changes nothing. So a model that has learnt one was trained with
        a sigmoid for each pair of image and text (arXiv 2303.15343), and one without it with a softmax.
        """
        return self.bias is not None

    def tokens(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """Tokenise, padded to one length, on the model's device.

        Raises:
            ValueError: If a sentence is too long. It is not cut, for the map would explain less than the label says.
        """
        padding = {"padding": True} if self.pad_to is None else {"padding": "max_length", "max_length": self.pad_to}
        tokens = self.tokenizer(list(sentences), return_tensors="pt", **padding)
        if tokens["input_ids"].shape[1] > self.max_length:
            lengths = [len(ids) for ids in self.tokenizer(list(sentences))["input_ids"]]
            longest = max(range(len(lengths)), key=lengths.__getitem__)
            raise ValueError(
                f"The prompt {sentences[longest][:50]!r}... has {lengths[longest]} tokens, but the text tower of "
                f"{self.name} reads at most {self.max_length}; shorten the label or the template."
            )
        return {name: value.to(next(self.model.parameters()).device) for name, value in tokens.items()}

    @torch.no_grad()
    def embed(self, sentences: Sequence[str]) -> Tensor:
        """Embeddings of sentences, brought to unit length, (S, D), float32."""
        chunks = [sentences[i : i + _CHUNK] for i in range(0, len(sentences), _CHUNK)]
        rows = [pooled(self.model.get_text_features(**self.tokens(chunk))) for chunk in chunks]
        return F.normalize(torch.cat(rows).float(), dim=-1)

    def head(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> PromptHead:
        """Make a head of labels; several templates are averaged as in CLIP's zero-shot evaluation (arXiv 2103.00020).

        That is, embeddings of unit length are averaged over the templates, and brought to unit length again.
        """
        weight = next(self.model.parameters())
        embeddings = torch.zeros(0, 1, device=weight.device)
        if labels:
            embeddings = self.embed(sentences_of(labels, templates))
            embeddings = F.normalize(embeddings.unflatten(0, (len(labels), -1)).mean(1), dim=-1)  # (C, D)
        return PromptHead(embeddings.to(weight.dtype), self.scale, self.bias, labels, templates, self.name)


def pooled(output: Any) -> Tensor:
    """What a tower gives for each image or sentence, (B, D)."""
    return getattr(output, "pooler_output", output)


def sentences_of(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every label in every template, label by label."""
    return [template.replace("{}", label) for label in labels for template in templates]


def check_prompts(
    labels: Sequence[str] | None, template: str | Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return labels and templates as tuples: no labels for None, the default template for None.

    Raises:
        TypeError: If these are no lists.
        ValueError: If a list is empty, a label is blank, no string or repeated, or a template has no {}.
    """
    if isinstance(labels, str):
        raise ValueError(f"candidate_labels is the string {labels!r}; pass a list, such as ['a cat', 'a dog'].")
    if not isinstance(labels, Sequence | None) or not isinstance(template, Sequence | None):
        raise TypeError(
            f"Prompts are {labels!r} and {template!r}; pass candidate_labels such as ['a cat', 'a dog'], and a "
            f"hypothesis_template such as {HYPOTHESIS_TEMPLATE!r}."
        )
    if labels is not None and not len(labels):
        raise ValueError("candidate_labels is empty; pass at least one label, such as ['a cat', 'a dog'].")
    labels = tuple(labels or ())
    for i, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"candidate_labels[{i}] is {label!r}; pass words that describe an image, like 'a cat'.")
        if label.strip() in (other.strip() for other in labels[:i]):
            raise ValueError(f"candidate_labels has {label!r} twice; leave one of them out.")
    templates = (
        (template,) if isinstance(template, str) else tuple([HYPOTHESIS_TEMPLATE] if template is None else template)
    )
    if not templates:
        raise ValueError(f"hypothesis_template is empty; pass at least one, such as {HYPOTHESIS_TEMPLATE!r}.")
    for text in templates:
        if not isinstance(text, str) or "{}" not in text:
            raise ValueError(
                f"hypothesis_template {text!r} has no {{}} where the label goes; write one like "
                f"{HYPOTHESIS_TEMPLATE!r}, or '{{}}' if the labels are whole sentences."
            )
    return labels, templates


def no_text_tower(name: str) -> ValueError:
    """The error for prompts to an ordinary classifier."""
    return ValueError(
        f"{name} takes no candidate_labels, for it has no text tower that can be run without an image; leave them "
        "out, or pass a zero-shot model such as CLIP or SigLIP."
    )
