"""Relevance propagation against loops over the equations of Chefer et al. (arXiv 2012.09838), and what it keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from untouched import left_as_found

from tve_hf import methods
from tve_hf.benchmark.run import BUDGETS
from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.methods._attention import attend, find_layout
from tve_hf.methods._gradients import differentiable
from tve_hf.methods._relevance import Tape

CLASS_IDX = torch.tensor([1, 3])
PATCHES = {"image_size": 32, "patch_size": 8, "num_labels": 5}
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
VISION = SIZES | {"image_size": 32, "patch_size": 8}
LRP = ["partial_lrp", "transformer_attribution"]

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **PATCHES)),
    "deit": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SIZES, **PATCHES)),
    "beit": lambda: hf.BeitForImageClassification(
        hf.BeitConfig(**SIZES, **PATCHES, use_relative_position_bias=True, layer_scale_init_value=0.1)
    ),
    "clip": lambda: hf.CLIPForImageClassification(
        hf.CLIPConfig(vision_config=VISION, text_config=SIZES | {"vocab_size": 10}, num_labels=5)
    ),
    "siglip": lambda: hf.SiglipForImageClassification(
        hf.SiglipConfig(vision_config=VISION, text_config=SIZES | {"vocab_size": 10}, num_labels=5)
    ),
}


@pytest.fixture(scope="module")
def classifier_of(fitted, processor_of) -> Callable[[str], SplitClassifier]:
    """Tiny split classifiers by name, in float64: ratios of relevance amplify rounding."""
    built: dict[str, SplitClassifier] = {}

    def get(name: str) -> SplitClassifier:
        if name not in built:
            built[name] = split_classifier(fitted(BUILDERS[name](), 32).double(), processor_of(3, 32, 32))
        return built[name]

    return get


# --- slow implementation --------------------------------------------------------------------------------------------


def _linear(x: np.ndarray, weight: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Eq. 5: x (T, I), weight (O, I), relevance of the output (T, O)."""
    taken = np.zeros_like(x)
    for t in range(len(x)):
        for i in range(len(weight)):
            parts = x[t] * weight[i]
            q = parts >= 0
            taken[t, q] += parts[q] / parts[q].sum() * relevance[t, i]
    return taken


def _normalized(u: np.ndarray, v: np.ndarray, relevance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 9-10: relevance of two operands, brought to the sum of what they were given."""
    both = abs(u.sum()) + abs(v.sum())
    return (
        u * abs(u.sum()) / both * relevance.sum() / u.sum(),
        v * abs(v.sum()) / both * relevance.sum() / v.sum(),
    )


def _sum(u: np.ndarray, v: np.ndarray, relevance: np.ndarray, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 7 of u + v, entry by entry."""
    of_u, of_v = np.zeros_like(u), np.zeros_like(v)
    for at in np.ndindex(u.shape):
        of_u[at] = u[at] * relevance[at] / (u[at] + v[at])
        of_v[at] = v[at] * relevance[at] / (u[at] + v[at])
    return _normalized(of_u, of_v, relevance) if normalize else (of_u, of_v)


def _product(u: np.ndarray, v: np.ndarray, relevance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 7 of u @ v, entry by entry, and Eq. 9-10."""
    of_u, of_v = np.zeros_like(u), np.zeros_like(v)
    for i in range(u.shape[0]):
        for j in range(v.shape[1]):
            parts = u[i] * v[:, j]
            of_u[i] += parts / parts.sum() * relevance[i, j]
            of_v[:, j] += parts / parts.sum() * relevance[i, j]
    return _normalized(of_u, of_v, relevance)


@dataclass
class Block:
    """What one block computes, by its weights alone."""

    weights: dict[str, Tensor]
    prefix: str

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{self.prefix}{name}.weight"].T + self.weights[f"{self.prefix}{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return _norm(self.weights, self.prefix + name, x)

    def run(self, tokens: Tensor) -> Tensor:
        self.tokens, self.normed = tokens, self.norm("layernorm_before", tokens)
        self.qkv = [self.linear(f"attention.{n}_proj", self.normed).unflatten(1, (2, 8)) for n in "qkv"]
        query, key, value = self.qkv
        logits = [query[:, h] @ key[:, h].T / 8**0.5 for h in range(2)]
        self.maps = [torch.softmax(each, -1, torch.float32).double() for each in logits]  # as transformers rounds
        self.mixed = torch.cat([self.maps[h] @ value[:, h] for h in range(2)], 1)
        self.attended = self.linear("attention.o_proj", self.mixed)
        self.between = tokens + self.attended
        self.normed_again = self.norm("layernorm_after", self.between)
        self.hidden = nn.functional.gelu(self.linear("mlp.fc1", self.normed_again))
        self.added = self.linear("mlp.fc2", self.hidden)
        return self.between + self.added

    def weight(self, name: str) -> np.ndarray:
        return self.weights[f"{self.prefix}{name}.weight"].numpy()

    def back(self, relevance: np.ndarray, normalize: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        """Relevance of the tokens before the block, and of the attention of its heads."""
        skip, rest = _sum(_of(self.between), _of(self.added), relevance, normalize)
        rest = _linear(_of(self.hidden), self.weight("mlp.fc2"), rest)
        relevance = skip + _linear(_of(self.normed_again), self.weight("mlp.fc1"), rest)
        skip, rest = _sum(_of(self.tokens), _of(self.attended), relevance, normalize)
        rest = _linear(_of(self.mixed), self.weight("attention.o_proj"), rest)
        query, key, value = (_of(t) for t in self.qkv)
        maps, of_qkv = [], [np.zeros((len(rest), 16)) for _ in range(3)]
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            of_map, of_qkv[2][:, part] = _product(_of(self.maps[h]), value[:, h], rest[:, part])
            of_qkv[0][:, part], of_key = _product(query[:, h], key[:, h].T, of_map)
            of_qkv[1][:, part] = of_key.T
            maps.append(of_map)
        for name, taken in zip("qkv", of_qkv, strict=True):
            skip = skip + _linear(_of(self.normed), self.weight(f"attention.{name}_proj"), taken)
        return skip, maps


def _of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    spread = (x.var(-1, correction=0, keepdim=True) + 1e-12).sqrt()
    return (x - x.mean(-1, keepdim=True)) / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


class Run:
    """One image through a ViT, or a DeiT with its distillation token, and relevance back to each attention map."""

    def __init__(self, name: str, model: Any, image: Tensor, index: int, normalize: bool):
        weights = {key: tensor.detach() for key, tensor in model.state_dict().items()}
        heads = {"vit": ["classifier"], "deit": ["cls_classifier", "distillation_classifier"]}[name]
        self.prefix = len(heads)
        with torch.no_grad():
            tokens = getattr(model, name).embeddings(image.unsqueeze(0))[0]
        self.blocks = [Block(weights, f"{name}.layers.{i}.") for i in range(3)]
        tokens.requires_grad_()
        for block in self.blocks:
            tokens = block.run(tokens)
        read = [_norm(weights, f"{name}.layernorm", tokens)[i] for i in range(len(heads))]
        logits = [z @ weights[f"{h}.weight"].T + weights[f"{h}.bias"] for z, h in zip(read, heads, strict=True)]
        logit = sum(logits)[index] / len(heads)
        torch.testing.assert_close(logit, model(image.unsqueeze(0)).logits[0, index])
        maps = [attention for block in self.blocks for attention in block.maps]
        slopes = [_of(slope) for slope in torch.autograd.grad(logit, maps)]
        self.slopes = [slopes[2 * i : 2 * i + 2] for i in range(3)]

        one_hot = np.zeros((1, 5))
        one_hot[0, index] = 1
        parts = [one_hot]
        if len(heads) == 2:
            parts = list(_sum(*(_of(each)[None] for each in logits), one_hot, normalize))
        relevance = np.zeros(tokens.shape)
        for i, (z, head) in enumerate(zip(read, heads, strict=True)):
            relevance[i] = _linear(_of(z)[None], weights[f"{head}.weight"].numpy(), parts[i])[0]
        self.relevances = []
        for block in reversed(self.blocks):
            relevance, of_maps = block.back(relevance, normalize)
            self.relevances.insert(0, of_maps)

    def row(self, square: np.ndarray) -> Tensor:
        rows = sum(square[i] for i in range(self.prefix)) / self.prefix
        return torch.from_numpy(rows[self.prefix :]).view(4, 4)


def _slow_partial_lrp(run: Run) -> Tensor:
    return run.row((run.relevances[-1][0].clip(min=0) + run.relevances[-1][1].clip(min=0)) / 2)


def _slow_transformer_attribution(run: Run, start_layer: int = 0) -> Tensor:
    product = np.eye(16 + run.prefix)
    for slopes, relevances in list(zip(run.slopes, run.relevances, strict=True))[start_layer:]:
        positive = [(slope * of_map).clip(min=0) for slope, of_map in zip(slopes, relevances, strict=True)]
        product = (np.eye(16 + run.prefix) + (positive[0] + positive[1]) / 2) @ product
    return run.row(product)


def _assert_same(scores: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_equals_a_slow_one(classifier_of, images, name) -> None:
    classifier, pixel_values = classifier_of(name), images(2, 32).double()
    partial = methods.explain("partial_lrp", classifier, pixel_values, CLASS_IDX, 4)
    whole = methods.explain("transformer_attribution", classifier, pixel_values, CLASS_IDX, 4)
    late = methods.explain("transformer_attribution", classifier, pixel_values, CLASS_IDX, 4, start_layer=-2)
    for b in range(2):
        given = name, classifier.backbone.model, pixel_values[b], int(CLASS_IDX[b])
        _assert_same(partial[b], _slow_partial_lrp(Run(*given, normalize=False)))
        run = Run(*given, normalize=True)
        _assert_same(whole[b], _slow_transformer_attribution(run))
        _assert_same(late[b], _slow_transformer_attribution(run, 1))


# --- what it keeps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", BUILDERS)
def test_relevance_is_kept_from_block_to_block(classifier_of, images, name, normalize) -> None:
    classifier, pixel_values = classifier_of(name), images(2, 32).double()
    layout = find_layout(classifier, pixel_values)
    tokens: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        tokens.append(output if isinstance(output, Tensor) else output[0])

    hooks = (classifier.backbone.model.get_submodule(block).register_forward_hook(keep) for block in layout.blocks)
    with differentiable(pixel_values) as x, Tape(classifier, x) as tape:
        attended = attend(classifier, x, layout, hooks)
    found = tape.relevance(attended.logits, CLASS_IDX, tokens, normalize)
    assert len(found) == 3
    for relevance, tensor in zip(found, tokens, strict=True):
        assert relevance.shape == tensor.shape
        torch.testing.assert_close(relevance.flatten(1).sum(1), torch.ones(2).double(), rtol=0, atol=1e-6)


def test_attention_takes_half_of_what_it_makes(classifier_of, images) -> None:
    """The other half goes to the values: by Eq. 7 either would take all."""
    classifier, pixel_values = classifier_of("vit"), images(2, 32).double()
    layout = find_layout(classifier, pixel_values)
    made: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        made.append(args[0])

    last = classifier.backbone.model.vit.layers[-1].attention.o_proj
    with torch.no_grad(), Tape(classifier, pixel_values) as tape:
        attended = attend(classifier, pixel_values, layout, (m.register_forward_hook(keep) for m in [last]))
    of_map, of_output = tape.relevance(attended.logits, CLASS_IDX, [attended.maps[-1], made[0]])
    torch.testing.assert_close(of_map.flatten(1).sum(1), of_output.flatten(1).sum(1) / 2)


def test_it_runs_only_when_named() -> None:
    """LRP is patented: no ready list may bring it in."""
    assert set(LRP) <= methods.available()
    assert not {spec.split("@")[0] for budget in BUDGETS.values() for spec in budget} & set(LRP)


# --- what it cannot serve -------------------------------------------------------------------------------------------


class Running(nn.Module):
    """A head that sums over classes in turn."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 5)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.linear(embeddings).cumsum(-1)


class InPlace(Running):
    """A head that overwrites what it has computed."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.linear(embeddings).mul_(2)


@pytest.mark.parametrize("method", LRP)
@pytest.mark.parametrize(("head", "name"), [(Running, "cumsum"), (InPlace, "mul_")])
def test_an_operation_without_a_rule_is_refused_by_name(classifier_of, images, method, head, name) -> None:
    classifier = classifier_of("vit").with_head(head(16).double())
    with (
        left_as_found(classifier.backbone.model),
        pytest.raises(ValueError, match=rf"computes aten\.{name}\.\S+, through which .* such as attention_cam"),
    ):
        methods.explain(method, classifier, images(2, 32).double(), CLASS_IDX, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", LRP)
def test_half_precision_is_computed_in_single(classifier_of, images, fitted, processor_of, method, dtype) -> None:
    model = fitted(BUILDERS["vit"](), 32).to(dtype)
    scores = methods.explain(
        method, split_classifier(model, processor_of(3, 32, 32)), images(2, 32).to(dtype), CLASS_IDX, 4
    )
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all() and (scores.flatten(1).std(1) > 0).all()
