"""Meta-attribution by brute force (Definition 1), and attribution transfer (Definition 2).

Equation numbers are those of "Learning Meta-attribution for Transferable Vision Explainer", arXiv 2312.15359.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .classifiers import SplitClassifier
from .classifiers.given import ClassifierInput, split_and_pixels
from .configuration_tve import TVEConfig
from .inputs import whole_number
from .patches import GridSize, average_over_neighborhoods, grid_of, neighborhoods

# What is read of a class in an embedding.
Evidence = Literal["log_prob", "logit", "prob"]
# Logits that are held at once, in float32: of all patches and classes, of which 21,000 are no rarity.
MOST_LOGITS = 2**22


@dataclass(frozen=True)
class Rule:
    """How (kept, removed) become scores, without training: phi = part(kept) - part(removed).

    Args:
        evidence: what is read from an embedding: a log-probability (nats), a logit or a probability.
        standardized: scale each part over the map to mean 0 and deviation 1, so that neither drowns the other.
        averaged: average the map over each patch's neighbourhood, since every patch belongs to all those windows.
        kept: whether the kept part counts; otherwise phi = -part(removed).
    """

    evidence: Evidence
    standardized: bool = False
    averaged: bool = False
    kept: bool = True

    def read(self, logits: Tensor, normalizer: Tensor | None) -> Tensor:
        """Evidence of some classes, of their logits.

        Args:
            normalizer: log-sum-exp of the logits of all classes, which broadcasts with those of some; None where each
                class has a probability of its own, sigmoid(logit).
        """
        if self.evidence == "logit":
            return logits
        log_prob = F.logsigmoid(logits) if normalizer is None else logits - normalizer
        return log_prob if self.evidence == "log_prob" else log_prob.exp()

    def subtract(self, kept: Tensor, removed: Tensor) -> Tensor:
        """Scores before averaging, (B, K, N), of the evidence of classes in kept and in removed, (B, K, N) each."""

        def part(chosen: Tensor) -> Tensor:
            if self.standardized:
                spread = chosen.std(-1, keepdim=True, correction=0)
                constant = spread <= 1e-5 * chosen.abs().amax(-1, keepdim=True)  # but for rounding, not to be blown up
                chosen = (chosen - chosen.mean(-1, keepdim=True)) / spread.clamp(min=1e-6)
                chosen = chosen.masked_fill(constant, 0)
            return chosen

        return part(kept) - part(removed) if self.kept else -part(removed)


RULES: dict[str, Rule] = {
    "log_prob": Rule("log_prob"),  # Eq. 7
    "log_prob_averaged": Rule("log_prob", averaged=True),
    "logit": Rule("logit"),
    "logit_averaged": Rule("logit", averaged=True),
    "prob": Rule("prob"),
    "prob_averaged": Rule("prob", averaged=True),
    "removed_averaged": Rule("log_prob", averaged=True, kept=False),
    "standardized_logit": Rule("logit", standardized=True),
    "standardized_logit_averaged": Rule("logit", standardized=True, averaged=True),
    "standardized_prob_averaged": Rule("prob", standardized=True, averaged=True),
}

# Of the rules that keep sign and units, the one that holds up best: examples/study_rules.py.
DEFAULT_RULE = "logit_averaged"
# The same for each kind of explainer. Of random ones pre-training chooses by held-out images, and keeps it in the
# config: windows of neighbours help on fine grids, and blur coarse ones.
DEFAULT_RULES = {"antithetical": DEFAULT_RULE, "random": "prob"}
RANDOM_CHOICES = ("prob", "prob_averaged")

_UNITS: dict[Evidence, str] = {
    "log_prob": "change of log-probability, nats",
    "logit": "change of logit",
    "prob": "change of probability",
}


def unit_of(name: str | None) -> str:
    """The unit of the scores that a rule makes, or a method without a rule; raises ValueError for an unknown one."""
    if name is None:
        return "score"
    rule = rule_named(name)
    return "standard deviations" if rule.standardized else _UNITS[rule.evidence]


def rule_of(config: TVEConfig) -> str:
    """The rule for what an explainer predicts, where nothing else is asked for: its own, or that of its kind."""
    return config.rule or DEFAULT_RULES[config.backgrounds]


def rule_named(name: str) -> Rule:
    """Look a rule up; raises ValueError for an unknown one."""
    if name not in RULES:
        raise ValueError(f"Unknown rule {name!r}; choose one of {', '.join(RULES)}.")
    return RULES[name]


def check_rule(config: TVEConfig, name: str) -> None:
    """Refuse a rule that makes no sense of what an explainer predicts.

    Raises:
        ValueError: If there is no such rule; or if the explainer is one of random backgrounds, which predicts one phi
            for each patch, and the rule reads only one part or scales both.
    """
    how = rule_named(name)
    if config.backgrounds == "random" and (how.standardized or not how.kept):
        plain = [other for other, rule in RULES.items() if not rule.standardized and rule.kept]
        raise ValueError(
            f"The rule {name!r} is for explainers of two backgrounds, and this one has backgrounds='random'; choose "
            f"one of {', '.join(plain)}."
        )


@torch.no_grad()
def exact_meta_attribution(
    classifier: ClassifierInput,
    pixel_values: Any,
    grid_size: GridSize | None = None,
    hops: int = 2,
    patch_idx: Tensor | None = None,
    removal: str = "zero",
    chunk_size: int | None = None,
    **inputs: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute g_z = G(N(z); x) and h_z = G(Z \\ N(z); x) by brute force (Eq. 6), two masked passes a patch.

    Args:
        classifier: its backbone is G; or a model or name, which is split first.
        pixel_values: (B, 3, H, W), or images, one or a list, which the classifier's image processor prepares.
        grid_size: P, or (rows, cols); it divides the image. `classifier.default_grid` if None.
        hops: radius of the neighbourhood N(z).
        patch_idx: patches to compute, (B, k) int64; all N if None.
        removal: what replaces removed pixels, a key of `patches.REMOVALS`.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Returns:
        kept g and removed h, (B, k or N, D) each, in the backbone's dtype.

    Raises:
        ValueError: If the batch is empty, the grid does not divide the image, or an index is out of range.
    """
    whole_number("hops", hops, least=0)
    split, pixel_values, inputs = split_and_pixels(exact_meta_attribution, classifier, pixel_values, inputs)
    batch = pixel_values.shape[0]
    if grid_size is None:
        grid_size = split.default_grid(pixel_values, **inputs)
    near = neighborhoods(grid_size, hops, pixel_values.device)
    num_patches = near.shape[0]
    if patch_idx is None:
        patch_idx = torch.arange(num_patches, device=pixel_values.device).expand(batch, -1)
    if patch_idx.ndim != 2 or patch_idx.shape[0] != batch or patch_idx.shape[1] == 0:
        raise ValueError(f"patch_idx has shape {tuple(patch_idx.shape)}; pass (B, k) with B = {batch} images.")
    if patch_idx.min() < 0 or patch_idx.max() >= num_patches:
        raise ValueError(f"patch_idx must hold patches between 0 and {num_patches - 1}; got {patch_idx.tolist()}.")
    keep = near[patch_idx.to(near.device)]  # (B, k, N)
    keep = torch.cat([keep, ~keep], dim=1)  # (B, 2k, N)
    embeddings = split.embed_masked(pixel_values, keep, grid_size, removal, chunk_size, **inputs)
    kept, removed = embeddings.chunk(2, dim=1)
    return kept, removed


def transfer(
    kept: Tensor,
    removed: Tensor,
    classifier: SplitClassifier,
    class_idx: Tensor,
    rule: str = DEFAULT_RULE,
    grid_size: GridSize | None = None,
    hops: int = 2,
) -> Tensor:
    """Turn meta-attributions into scores of a class with the classifier's head alone (Definition 2).

        phi_z = log H_t(g_z)[y] - log H_t(h_z)[y]        (Eq. 7; `rule="log_prob"`)

    Args:
        kept: g or its prediction, (B, N, D).
        removed: h or its prediction, (B, N, D).
        classifier: its head is H_t.
        class_idx: y, (B,) int64; or (B, K) for K classes of each image at once.
        rule: a key of `RULES`.
        grid_size: grid of the N patches, for the rules that average over neighbourhoods; square if None.
        hops: radius of those neighbourhoods.

    Returns:
        scores (B, N), or (B, K, N); positive supports the class. Nats under "log_prob".

    Raises:
        ValueError: If D, the batch or the class does not fit the head, or a value is not finite.
    """
    how = rule_named(rule)
    if kept.shape != removed.shape or kept.ndim != 3:
        raise ValueError(f"kept {tuple(kept.shape)} and removed {tuple(removed.shape)} must both be (B, N, D).")
    if kept.shape[0] == 0:
        raise ValueError("kept and removed hold no image; pass a batch of at least one.")
    if kept.shape[-1] != classifier.embedding_dim:
        raise ValueError(
            f"The meta-attributions have D = {kept.shape[-1]}, but the classifier's head reads "
            f"{classifier.embedding_dim}; use an explainer pre-trained for this backbone."
        )
    classifier.check_classes(class_idx, kept.shape[0], several=True)
    classes = class_idx if class_idx.ndim == 2 else class_idx.unsqueeze(1)

    scores = apply_rule(how, kept, removed, classifier, classes)
    # A traced graph knows no values and raises no errors: NaN goes in and out.
    if not torch.compiler.is_compiling() and not torch.isfinite(scores).all():
        if all(torch.isfinite(x).all() for x in (kept, removed, *classifier.head.parameters())):
            raise ValueError(
                f"The head of {classifier.name} gives NaN or infinity for the embedding of a masked image, or a mean "
                "of such (base ± phi); put a head on it that is finite for every embedding, for example by clamping."
            )
        raise ValueError(
            "The scores are not finite: the image, the classifier's or the explainer's weights hold NaN or infinity."
        )
    if how.averaged:
        scores = average_over_neighborhoods(scores, grid_of(scores.shape[-1], grid_size), hops)
    return scores if class_idx.ndim == 2 else scores.squeeze(1)


def of_class(values: Tensor, class_idx: Tensor) -> Tensor:
    """Choose the values of each image's class: (B, K, C) and (B,) -> (B, K)."""
    index = class_idx.to(values.device).view(-1, 1, 1).expand(-1, values.shape[1], 1)
    return values.gather(-1, index).squeeze(-1)


def apply_rule(how: Rule, kept: Tensor, removed: Tensor, classifier: SplitClassifier, classes: Tensor) -> Tensor:
    """Scores of a rule before averaging: (B, N, D) twice and classes (B, K) -> (B, K, N)."""
    return how.subtract(*(evidence_of(how, part, classifier, classes) for part in (kept, removed)))


def evidence_of(how: Rule, embeddings: Tensor, classifier: SplitClassifier, classes: Tensor) -> Tensor:
    """What a rule reads of each image's classes (B, K) in its embeddings (B, N, D): (B, K, N), float32."""
    batch, number, _ = embeddings.shape
    if torch.compiler.is_compiling():  # which knows no size of the batch
        at_once = number
    else:
        at_once = max(1, MOST_LOGITS // (batch * max(1, len(classifier.id2label))))
    evidence = []
    for some in embeddings.split(at_once, dim=1):
        logits = classifier.head(some.to(classifier.dtype)).float()  # (B, n, C)
        chosen = logits.gather(-1, classes.unsqueeze(1).expand(-1, some.shape[1], -1)).transpose(1, 2)
        alone = classifier.multi_label or how.evidence == "logit"
        evidence.append(how.read(chosen, None if alone else logits.logsumexp(-1).unsqueeze(1)))
    return torch.cat(evidence, dim=-1)
