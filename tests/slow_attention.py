"""Attention methods by loops over their equations, on models whose pieces are put together by hand.

An image at a time, on four blocks of two heads and a grid of 4 x 4 patches.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface

from tve_hf.classifiers import SplitClassifier

_PROBED: list[Tensor] = []


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention written out, which shows its weights to the tests alone."""
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling, -1)
    _PROBED.append(weights)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("probe_of_tests", _probe_attention)


@dataclass
class Plain:
    """A model in three pieces: tokens before the blocks, the blocks, and logits of the tokens after them."""

    start: Callable[[Tensor], Tensor]
    blocks: list[nn.Module]
    logits: Callable[[Tensor], Tensor]
    prefix: int
    queries: list[int]  # whose rows of attention are read
    pool: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # tokens -> embedding, attention (B, heads, 1, T)
    head: Callable[[Tensor], Tensor] | None = None


def pooled_by_attention(head: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """SigLIP's pooler by its equations: one learnt query, multi-head attention, MLP with a skip."""
    batch, count, width = tokens.shape
    attention, heads = head.attention, head.attention.num_heads
    w_q, w_k, w_v = attention.in_proj_weight.split(width)
    b_q, b_k, b_v = attention.in_proj_bias.split(width)
    weights, mixed = [], []
    for i in range(heads):
        part = slice(i * width // heads, (i + 1) * width // heads)
        query = head.probe[0] @ w_q[part].T + b_q[part]  # (1, width / heads)
        key, value = tokens @ w_k[part].T + b_k[part], tokens @ w_v[part].T + b_v[part]
        weights.append(torch.softmax(query @ key.transpose(1, 2) / (width // heads) ** 0.5, -1))
        mixed.append((weights[-1], value))
    stacked = torch.stack(weights, 1)  # (B, heads, 1, T)
    out = torch.cat([stacked[:, i] @ value for i, (_, value) in enumerate(mixed)], -1)
    out = out @ attention.out_proj.weight.T + attention.out_proj.bias
    return (out + head.mlp(head.layernorm(out)))[:, 0], stacked


def _plain(name: str, model: Any) -> Plain:
    """The pieces of a copy of a model, put together by hand."""
    all_patches, after_one = list(range(16)), list(range(1, 17))
    if name == "vit":
        vit = model.vit
        return Plain(vit.embeddings, vit.layers, lambda z: model.classifier(vit.layernorm(z)[:, 0]), 1, [0])
    if name == "deit":
        deit = model.deit

        def both(z: Tensor) -> Tensor:
            z = deit.layernorm(z)
            return (model.cls_classifier(z[:, 0]) + model.distillation_classifier(z[:, 1])) / 2

        return Plain(deit.embeddings, deit.layers, both, 2, [0, 1])
    if name == "clip_classifier":
        vision = model.vision_model
        return Plain(
            lambda x: vision.pre_layrnorm(vision.embeddings(x)),
            vision.encoder.layers,
            lambda z: model.classifier(z[:, 1:].mean(1)),
            1,
            after_one,
        )
    if name == "siglip_classifier":
        vision = model.vision_model
        return Plain(
            vision.embeddings,
            vision.encoder.layers,
            lambda z: model.classifier(vision.post_layernorm(z).mean(1)),
            0,
            all_patches,
        )
    if name == "clip":
        vision = model.tower.vision_model

        def project(z: Tensor) -> Tensor:
            return model.head(model.tower.visual_projection(vision.post_layernorm(z[:, 0])))

        return Plain(lambda x: vision.pre_layrnorm(vision.embeddings(x)), vision.encoder.layers, project, 1, [0])
    vision = model.tower

    def pool(z: Tensor) -> tuple[Tensor, Tensor]:
        return pooled_by_attention(vision.head, vision.post_layernorm(z))

    return Plain(
        vision.embeddings, vision.encoder.layers, lambda z: model.head(pool(z)[0]), 0, all_patches, pool, model.head
    )


SLOW = ["vit", "deit", "clip", "clip_classifier", "siglip", "siglip_classifier"]


class Run:
    """One image through a plain model, every tensor kept in one graph."""

    def __init__(self, name: str, classifier: SplitClassifier, image: Tensor, index: int):
        model = copy.deepcopy(classifier.backbone.model)
        for module in model.modules():
            if isinstance(module, hf.PreTrainedModel):
                module.set_attn_implementation("probe_of_tests")
        self.plain = _plain(name, model)
        _PROBED.clear()
        tokens = self.plain.start(image.unsqueeze(0))
        self.tokens = []
        for block in self.plain.blocks:
            tokens = block(tokens, attention_mask=None) if "lip" in name else block(tokens)
            self.tokens.append(tokens)
        self.maps, self.index = list(_PROBED), index
        assert len(self.maps) == 4
        self.pooled: Tensor | None = None
        if self.plain.pool is not None:
            embedding, self.pooled = self.plain.pool(tokens)
            self.logit = self.plain.head(embedding)[0, index]
        else:
            self.logit = self.plain.logits(tokens)[0, index]
        torch.testing.assert_close(self.logit, classifier(image.unsqueeze(0)).logits[0, index])

    def row(self, square: Tensor) -> Tensor:
        """Rows of the queries, patches only, (T, T) -> (4, 4)."""
        total = sum(square[query] for query in self.plain.queries) / len(self.plain.queries)
        return total[self.plain.prefix :].view(4, 4)


def slow_raw(run: Run) -> Tensor:
    if run.pooled is not None:
        return sum(head[0] for head in run.pooled[0]).view(4, 4) / 2
    return run.row(sum(head for head in run.maps[-1][0]) / 2)


def slow_rollout(run: Run) -> Tensor:
    flow = torch.eye(run.maps[0].shape[-1])
    for attention in run.maps:
        step = (attention[0, 0] + attention[0, 1]) / 2 + torch.eye(len(flow))
        for query in range(len(step)):
            step[query] = step[query] / step[query].sum()
        flow = step @ flow
    if run.pooled is not None:
        return ((run.pooled[0, 0] + run.pooled[0, 1]) / 2 @ flow).view(4, 4)
    return run.row(flow)


def slow_attention_cam(run: Run) -> Tensor:
    attention = run.maps[-1] if run.pooled is None else run.pooled
    (slope,) = torch.autograd.grad(run.logit, attention, retain_graph=True)
    queries = run.plain.queries if run.pooled is None else [0]
    total = torch.zeros(16)
    for head in range(2):
        rows = [attention[0, head, query, run.plain.prefix :] for query in queries]
        slopes = [slope[0, head, query, run.plain.prefix :] for query in queries]
        total = total + torch.stack(slopes).mean() * torch.stack(rows).mean(0)
    return total.view(4, 4)


def slow_chefer(run: Run, start_layer: int = 0) -> Tensor:
    relevance = torch.eye(run.maps[0].shape[-1])
    for attention in run.maps[start_layer:]:
        (slope,) = torch.autograd.grad(run.logit, attention, retain_graph=True)
        mean = sum((slope[0, head] * attention[0, head]).clamp(min=0) for head in range(2)) / 2
        relevance = relevance + mean @ relevance
    if run.pooled is not None:
        (slope,) = torch.autograd.grad(run.logit, run.pooled, retain_graph=True)
        mean = sum((slope[0, head] * run.pooled[0, head]).clamp(min=0) for head in range(2)) / 2
        return (mean @ relevance).view(4, 4)
    return run.row(relevance)


def slow_legrad(run: Run, layers: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
    total = torch.zeros(16)
    for layer in layers:
        if run.pooled is not None:
            embedding, attention = run.plain.pool(run.tokens[layer])
            score = run.plain.head(embedding)[0, run.index]
        else:
            attention, score = run.maps[layer], run.plain.logits(run.tokens[layer])[0, run.index]
        (slope,) = torch.autograd.grad(score, attention, retain_graph=True)
        heads, queries, keys = slope[0].shape
        for head in range(heads):
            for query in range(queries):
                for key in range(run.plain.prefix, keys):
                    value = max(slope[0, head, query, key].item(), 0.0)
                    total[key - run.plain.prefix] += value / heads / queries / len(layers)
    return total.view(4, 4)


SLOW_METHODS = {
    "raw_attention": slow_raw,
    "rollout": slow_rollout,
    "attention_cam": slow_attention_cam,
    "chefer_cam": slow_chefer,
    "legrad": slow_legrad,
}
