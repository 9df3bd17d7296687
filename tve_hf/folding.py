"""An affine head folded into an explainer's last layer: scores without the D-vectors that they would be read from.

The `"backbone"` trunk predicts V h_z + c of hidden states h_z, of which a linear classifier's logits W e + b are
(W V) h_z + W c + b. So a class costs one product of `hidden_size` for each patch, and no vector of D is formed.
Probabilities need the log-sum-exp of all C logits, which is taken some classes at a time. What cannot be folded, such
as a head that is not affine, goes the way of `attribution.transfer`, whose results these are to rounding.

Shapes: B images, N patches, K classes of each, C classes of the head, D = embedding_dim; R of C, or K for each image.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attribution import MOST_LOGITS, Rule, rule_named, transfer
from .classifiers import SplitClassifier
from .heads import AffineMap, affine_map, tolerance
from .modeling_tve import TVEExplainer
from .patches import average_over_neighborhoods
from .trunk_backbone import TVEBackboneTrunk, TVEDifferenceHead, efficient, kept_and_removed


@torch.no_grad()
def explain_pass(
    explainer: TVEExplainer,
    classifier: SplitClassifier,
    pixel_values: Tensor,
    seen: Any,
    class_idx: Tensor,
    rule: str,
) -> Tensor:
    """Scores of one pass of the classifier and one of its explainer (Eq. 10).

    Args:
        explainer: pre-trained for the classifier's backbone.
        classifier: reads the feature maps that the explainer's config names.
        pixel_values: images, (B, 3, H, W).
        seen: `classifier(pixel_values)`, a `SplitClassifierOutput`.
        class_idx: (B,) int64; or (B, K) for K classes of each image at once.
        rule: a key of `attribution.RULES`.

    Returns:
        What `transfer` gives for the explainer's predictions, on its grid: (B, rows, cols), or (B, K, rows, cols).

    Raises:
        ValueError: As `TVEExplainer.forward` and `transfer`.
    """
    classifier.check_classes(class_idx, len(pixel_values), several=True)
    config, how = explainer.config, rule_named(rule)
    classes = class_idx if class_idx.ndim == 2 else class_idx.unsqueeze(1)
    read = _Pass(pixel_values, seen.features, seen.embeddings, seen.logits)
    folded = folded_head(explainer, classifier, read)
    scores = None
    if folded is not None:
        scores = folded.scores(explainer, read, classes, how, classifier.multi_label)
        if how.averaged:
            scores = average_over_neighborhoods(scores, explainer.grid_shape, config.hops)
    if scores is None or not scores.isfinite().all():  # of which `transfer` says what is wrong
        scores = transfer(*read.predicted(explainer), classifier, classes, rule, explainer.grid_shape, config.hops)
    scores = scores.unflatten(-1, explainer.grid_shape)
    return scores if class_idx.ndim == 2 else scores.squeeze(1)


class _Pass(NamedTuple):
    """What a pass of the classifier saw and gave."""

    pixel_values: Tensor
    features: tuple[Tensor, ...]
    embeddings: Tensor
    logits: Tensor

    def predicted(self, explainer: TVEExplainer) -> tuple[Tensor, Tensor]:
        """Kept and removed without folding, (B, N, D) each."""
        out = explainer(pixel_values=self.pixel_values, features=self.features, embeddings=self.embeddings)
        return out.kept, out.removed


class _Pooled(NamedTuple):
    """A feature map whose mean is the embedding.

    Args:
        positions: its vectors, (B, h * w, D).
        spread: what each patch takes of each position, (N, h * w).
    """

    positions: Tensor
    spread: Tensor

    @classmethod
    def of(cls, feature: Tensor, grid: tuple[int, int]) -> "_Pooled":
        """Of a map (B, D, h, w), which bilinear interpolation brings to the grid."""
        size = feature.shape[2:]
        each = torch.eye(size.numel(), dtype=feature.dtype, device=feature.device).unflatten(1, size).unsqueeze(0)
        spread = F.interpolate(each, size=grid, mode="bilinear", align_corners=False)
        return cls(feature.flatten(2).mT.contiguous(), spread[0].flatten(1).mT)


class FoldedHead(NamedTuple):
    """The last layer of an explainer and an affine head on it, as one, for all classes of the head or some.

    Args:
        weight: from hidden states to the logits of the trunk's two predictions, (R, 2, hidden). For random backgrounds
            (R, 3, hidden): to phi from each patch's, then to phi and to base from their mean.
        bias: likewise, (R, 2) or (R, 3), without that of the head.
        empty: logits of the empty image, (R,).
        share: from the pooled feature map to the logits of what each position adds to its mean, (R, D); None if the
            predictions start from no such map.
    """

    weight: Tensor
    bias: Tensor
    empty: Tensor
    share: Tensor | None

    @classmethod
    def of(cls, trunk: TVEBackboneTrunk, head: AffineMap) -> "FoldedHead":
        """Fold a head, all R = C classes of it, into the trunk of an explainer."""
        empty = trunk.empty_embedding.float()
        weight, bias = trunk.last_layer()
        weight = head.weight @ weight  # (2 or 3, C, hidden)
        bias = bias @ head.weight.T  # (2 or 3, C)
        share = None
        if trunk.pooled is not None:
            share = head.weight * (1 + trunk.share_change.float()) / trunk.position_embeddings.shape[1]
            bias[0] -= share @ empty
        weight, bias = weight.transpose(0, 1).contiguous(), bias.T.contiguous()
        return cls(weight, bias, head.weight @ empty + head.bias, share)

    def only(self, classes: Tensor | slice) -> "FoldedHead":
        """That of some classes: of a slice of them, or of K for each image, (B, K), with B before R in every shape."""
        share = None if self.share is None else self.share[classes]
        return FoldedHead(self.weight[classes], self.bias[classes], self.empty[classes], share)

    def logits(
        self, explainer: TVEExplainer, hidden: Tensor, pooled: "_Pooled | None", full: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of kept and of removed, (B, N, R) each.

        Args:
            explainer: its config says what is made of the trunk's two predictions.
            hidden: what `TVEBackboneReader.read` gives, (B, N, hidden), float32.
            pooled: the pooled feature map, where predictions start from it.
            full: the classifier's own logits of these classes, (B, R).
        """
        prob = explainer.keep_prob
        weights, biases = self.weight.unbind(-2), self.bias.unsqueeze(-3).unbind(-1)
        phi = hidden @ weights[0].mT
        if explainer.config.backgrounds != "random":
            kept = phi + (biases[0] + self.empty.unsqueeze(-2))
            return kept, full.unsqueeze(1) + (hidden @ weights[1].mT + biases[1])
        # What all patches share is added up at one of them: at all, it would take longer than their own products.
        mean = hidden.mean(1, keepdim=True)
        own, all_alike, base_change = (mean @ to.mT for to in weights)  # (B, 1, R) each
        level = own + all_alike + (biases[0] + biases[1])  # the mean of phi
        if self.share is not None and pooled is not None:
            added = pooled.positions @ self.share.mT  # (B, h * w, R)
            phi.baddbmm_(pooled.spread.expand(len(phi), -1, -1), added)
            evenly = pooled.spread.mean(0) @ added
            own, level = own + evenly.unsqueeze(1), level + evenly.unsqueeze(1)
        base = torch.lerp(self.empty, full, prob) + (base_change + biases[2]).squeeze(1)
        if explainer.is_efficient:
            total, base = efficient(phi.shape[1] * level, self.empty, full, prob)
            level = total / phi.shape[1]
        return kept_and_removed(phi.add_(level - own), base, prob)

    def scores(self, explainer: TVEExplainer, read: _Pass, classes: Tensor, how: Rule, multi_label: bool) -> Tensor:
        """Scores of classes (B, K) before averaging, (B, K, N)."""
        trunk: Any = explainer.trunk
        hidden = trunk.read(read.pixel_values, read.features, read.embeddings)[0].float()
        pooled = None if self.share is None else _Pooled.of(read.features[trunk.pooled].float(), explainer.grid_shape)
        full = read.logits.float()

        def logits(rows: Tensor | slice, full: Tensor) -> tuple[Tensor, Tensor]:
            return self.only(rows).logits(explainer, hidden, pooled, full)

        chosen = logits(classes, full.gather(1, classes))  # 2 x (B, N, K)
        normalizers: Any = (None, None)
        if how.evidence != "logit" and not multi_label:
            at_once = max(64, MOST_LOGITS // 8 // hidden[..., 0].numel())
            some = [slice(start, start + at_once) for start in range(0, full.shape[1], at_once)]
            sums = [[part.logsumexp(-1) for part in logits(rows, full[:, rows])] for rows in some]
            normalizers = (
                torch.stack(part).logsumexp(0).unsqueeze(1) for part in zip(*sums, strict=True)
            )  # (B, 1, N)
        return how.subtract(*(how.read(part.mT, total) for part, total in zip(chosen, normalizers, strict=True)))


class _Kept(NamedTuple):
    """A folded head, None if it cannot be, and what tells whether it still is that of the head and the explainer.

    Args:
        state: of the weights, as `_state` gives it.
        direction: of logits, (C,), in which those of each pass are compared with W e + b.
        affine: the map to the logit in that direction, (D,) and ().
        tolerance: of that comparison, relative to the logits.
    """

    folded: FoldedHead | None
    state: tuple
    direction: Tensor
    affine: AffineMap
    tolerance: float

    def holds(self, read: _Pass) -> bool:
        """Whether a pass's logits are those of the folded head, which adapters change and leave its weights."""
        logits = read.logits.float()
        error = logits @ self.direction - (read.embeddings.float() @ self.affine.weight + self.affine.bias)
        return bool((error.abs() <= self.tolerance * logits.norm(dim=-1)).all())


# By head and explainer, since finding what a head does takes D passes of it. Holds neither of them alive.
_KEPT: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, _Kept]] = WeakKeyDictionary()


def folded_head(explainer: TVEExplainer, classifier: SplitClassifier, read: _Pass) -> FoldedHead | None:
    """A classifier's head folded into its explainer, kept until either changes; None if it cannot be folded."""
    trunk, head = explainer.trunk, classifier.head
    # A layer of another class, such as one with adapters, may do more than its weights say.
    if not isinstance(trunk, TVEBackboneTrunk):
        return None
    lasts = [trunk.get_submodule(name) for name in trunk.heads]
    if any(type(last) is not TVEDifferenceHead for last in lasts):
        return None
    of_trunk = [weight for last in lasts for weight in last.parameters()]
    weights = [*head.parameters(), *head.buffers(), *of_trunk, *trunk.starting_at_zero()]
    if any(weight.is_meta for weight in weights) or not read.logits.isfinite().all():
        return None
    state, of_head = _state(weights), _KEPT.setdefault(head, WeakKeyDictionary())
    kept = of_head.get(explainer)
    if kept is None or kept.state != state or not (kept.folded is None or kept.holds(read)):
        kept = of_head[explainer] = _fold(explainer, trunk, classifier, read, state)
    return kept.folded


def _fold(
    explainer: TVEExplainer, trunk: TVEBackboneTrunk, classifier: SplitClassifier, read: _Pass, state: tuple
) -> _Kept:
    """Fold a head, and accept that only if it gives these images the scores that `transfer` gives them."""
    affine = affine_map(classifier.head, classifier.embedding_dim, classifier.dtype, read.embeddings.device)
    if affine is None:
        nothing = torch.empty(0)
        return _Kept(None, state, nothing, AffineMap(nothing, nothing), 0.0)
    direction = torch.randn(len(affine.bias), generator=torch.Generator().manual_seed(0)).to(affine.bias)
    folded = FoldedHead.of(trunk, affine)
    along = AffineMap(direction @ affine.weight, direction @ affine.bias)
    kept = _Kept(folded, state, direction, along, tolerance(read.embeddings.dtype))
    classes = read.logits.argmax(-1, keepdim=True)
    scores = folded.scores(explainer, read, classes, rule_named("logit"), classifier.multi_label)
    error = (scores - transfer(*read.predicted(explainer), classifier, classes, "logit")).abs().amax()
    rounding = 8 * torch.finfo(classifier.dtype).eps * read.logits.abs().amax()  # of the way without folding
    same = bool(error <= tolerance(torch.float32) * scores.abs().amax() + rounding)
    return kept if same and kept.holds(read) else kept._replace(folded=None)


def _state(weights: list[Tensor]) -> tuple:
    """Where weights lie, how often they were written, and some values, since writing `.data` is not counted."""
    return tuple(
        (
            weight.data_ptr(),
            weight.dtype,
            0 if weight.is_inference() else weight._version,
            *weight.detach().flatten()[:: 1 + weight.numel() // 16].tolist(),
        )
        for weight in weights
    )


__all__ = ["FoldedHead", "explain_pass", "folded_head"]
