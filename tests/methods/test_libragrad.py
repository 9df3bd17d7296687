"""LibraGrad against its definition: the gradients that it balances, what they sum to, and FullGrad+ by hand."""

import math
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from untouched import left_as_found

from tve_hf import methods
from tve_hf.classifiers import split_classifier
from tve_hf.methods._balanced import Balanced, frozen

CLASS_IDX = torch.tensor([1, 3, 0])
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def _vit(**values) -> hf.ViTForImageClassification:
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZES, intermediate_size=64, num_labels=5, **values))


def _dinov2(**values) -> hf.Dinov2ForImageClassification:
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZES, mlp_ratio=2, num_labels=5, **values))


# Each with its first block, at whose input contributions are taken.
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gelu": (_vit, "vit.layers.0"),
    "eager attention": (lambda: _vit(attn_implementation="eager"), "vit.layers.0"),
    "relu": (lambda: _vit(hidden_act="relu"), "vit.layers.0"),
    "silu": (lambda: _vit(hidden_act="silu"), "vit.layers.0"),
    "a gate of sigmoid": (lambda: _vit(hidden_act="quick_gelu"), "vit.layers.0"),
    "a gate of tanh": (lambda: _vit(hidden_act="gelu_new"), "vit.layers.0"),
    "a gate of erf": (lambda: _vit(hidden_act="gelu_python"), "vit.layers.0"),
    "layer scale": (_dinov2, "dinov2.encoder.layer.0"),
    "SwiGLU": (lambda: _dinov2(use_swiglu_ffn=True), "dinov2.encoder.layer.0"),
}


# --- the gradients --------------------------------------------------------------------------------------------------


def _sums(model: nn.Module, block: str, pixel_values: Tensor, balanced: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and what tokens and what constants contribute to them, (B,) each, of CLASS_IDX."""
    mode, given = Balanced(), []

    def keep(module: nn.Module, args: tuple) -> None:
        given.append(args[0])
        mode.constants.clear()

    handle = model.get_submodule(block).register_forward_pre_hook(keep)
    x = pixel_values.clone().requires_grad_()
    with frozen(model):
        if balanced:
            with mode:
                logits = model(x).logits
        else:
            logits = model(x).logits
    handle.remove()
    of_class = logits.gather(1, CLASS_IDX.unsqueeze(1)).squeeze(1)
    added = [output for output, _ in mode.constants]
    slope, *slopes = torch.autograd.grad(of_class.sum(), [*given, *added], allow_unused=True)
    constants = torch.zeros(len(x))
    for (_, constant), at in zip(mode.constants, slopes, strict=True):
        if at is not None:
            constants = constants + (constant * at).flatten(1).sum(1)
    return of_class.detach(), (given[0] * slope).flatten(1).sum(1).detach(), constants.detach()


@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_constants_sum_to_the_logit(fitted, images, name) -> None:
    build, block = MODELS[name]
    model, pixel_values = fitted(build(), 32), images(3, 32)
    with torch.no_grad():
        expected = model(pixel_values).logits.gather(1, CLASS_IDX.unsqueeze(1)).squeeze(1)
    logits, tokens, constants = _sums(model, block, pixel_values, balanced=True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)  # no value changes
    assert (constants.abs() > 0.01).all()
    torch.testing.assert_close(tokens + constants, logits, rtol=0, atol=1e-5)


def test_without_biases_the_tokens_alone_sum_to_the_logit_and_by_plain_gradients_they_do_not(fitted, images) -> None:
    model, pixel_values = fitted(_vit(), 32), images(3, 32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "embeddings" not in name:
                parameter.zero_()
    logits, tokens, constants = _sums(model, "vit.layers.0", pixel_values, balanced=True)
    assert (constants == 0).all()
    torch.testing.assert_close(tokens, logits, rtol=0, atol=1e-5)
    _, plain, _ = _sums(model, "vit.layers.0", pixel_values, balanced=False)
    assert ((plain - logits).abs() > 0.1).all()


def _slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    with Balanced():
        output = function(x)
    torch.testing.assert_close(output, function(x.detach()))
    return torch.autograd.grad(output.sum(), x)[0]


def test_each_operation_has_the_gradient_of_its_equation() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 0
    other = torch.arange(4.0)
    torch.testing.assert_close(_slope(nn.functional.gelu, x), (1 + torch.erf(x / math.sqrt(2))) / 2)
    torch.testing.assert_close(_slope(nn.functional.silu, x), x.sigmoid())
    torch.testing.assert_close(_slope(nn.SiLU(inplace=True), x), x.sigmoid())
    torch.testing.assert_close(_slope(lambda z: z * z, x), x)  # half of 2 x
    torch.testing.assert_close(_slope(lambda z: z / (1 + z), x), 1 / (1 + x))
    torch.testing.assert_close(_slope(lambda z: z / z.norm(dim=-1, keepdim=True), x), 1 / _length(x))
    torch.testing.assert_close(_slope(lambda z: nn.functional.normalize(z, dim=-1), x), 1 / _length(x))
    torch.testing.assert_close(_slope(lambda z: z * (z * z).mean(-1, keepdim=True).rsqrt(), x), 2 / _length(x))
    torch.testing.assert_close(_slope(lambda z: nn.functional.rms_norm(z, (4,), other, 0), x), 2 * other / _length(x))
    deviation = x.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(
        _slope(lambda z: nn.functional.layer_norm(z, (4,), other, other, 0), x), (other - other.mean()) / deviation
    )
    torch.testing.assert_close(_slope(lambda z: z.softmax(-1) * z, x), x.softmax(-1))
    single = x[0]  # a head's: its own gradient
    torch.testing.assert_close(_slope(lambda z: z.softmax(-1) * other, single), _softmax_slope(single, other))


def _length(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True).expand_as(x)


def _softmax_slope(x: Tensor, weight: Tensor) -> Tensor:
    p = x.softmax(-1)
    return p * (weight - (p * weight).sum(-1, keepdim=True))


# --- the map --------------------------------------------------------------------------------------------------------


def _norm(x: Tensor, norm: nn.LayerNorm, bias: Tensor) -> Tensor:
    deviation = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
    return (x - x.mean(-1, keepdim=True)) / deviation * norm.weight + bias


def _slow_fullgrad_plus(model: hf.ViTForImageClassification, image: Tensor, index: int) -> Tensor:
    """FullGrad+ of one image by the equations, with a leaf for each bias at each token, (4, 4)."""
    leaves: list[Tensor] = []

    def at_tokens(bias: Tensor) -> Tensor:
        leaves.append(bias.detach().expand(17, -1).clone().requires_grad_())
        return leaves[-1]

    def affine(x: Tensor, linear: nn.Linear) -> Tensor:
        return x @ linear.weight.T + at_tokens(linear.bias)

    x = model.vit.embeddings(image.unsqueeze(0))[0]  # (17, 32)
    for layer in model.vit.layers:
        x = x.detach().requires_grad_() if not leaves else x
        leaves.append(x)
        normed = _norm(x, layer.layernorm_before, at_tokens(layer.layernorm_before.bias))
        attention, heads = layer.attention, []
        value = affine(normed, attention.v_proj)
        for head in (slice(0, 16), slice(16, 32)):
            query = (normed @ attention.q_proj.weight.T + attention.q_proj.bias)[:, head]
            key = (normed @ attention.k_proj.weight.T + attention.k_proj.bias)[:, head]
            heads.append((query @ key.T / 4).softmax(-1).detach() @ value[:, head])
        x = x + affine(torch.cat(heads, 1), attention.o_proj)
        normed = _norm(x, layer.layernorm_after, at_tokens(layer.layernorm_after.bias))
        hidden = affine(normed, layer.mlp.fc1)
        gate = ((1 + torch.erf(hidden / math.sqrt(2))) / 2).detach()
        x = x + affine(hidden * gate, layer.mlp.fc2)
    x = _norm(x, model.vit.layernorm, at_tokens(model.vit.layernorm.bias))
    logit = x[0] @ model.classifier.weight[index] + model.classifier.bias[index]
    slopes = torch.autograd.grad(logit, leaves)
    total = torch.zeros(17, dtype=x.dtype)
    for leaf, slope in zip(leaves, slopes, strict=True):
        total = total + (leaf.detach() * slope).sum(1)
    return total[1:].view(4, 4)


def test_a_vit_by_hand(fitted, images) -> None:
    model, pixel_values = fitted(_vit(), 32), images(3, 32)
    with left_as_found(model):
        scores = methods.explain("libragrad", split_classifier(model), pixel_values, CLASS_IDX, 4)
    assert (scores.flatten(1).amin(1) < 0).all() and (scores.flatten(1).amax(1) > 0).all()
    exact = fitted(_vit(), 32).double()
    for b in range(3):
        expected = _slow_fullgrad_plus(exact, pixel_values[b].double(), int(CLASS_IDX[b])).float()
        torch.testing.assert_close(scores[b], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_batch_gives_what_its_images_give(fitted, images) -> None:
    classifier, pixel_values = split_classifier(fitted(_dinov2(use_swiglu_ffn=True), 32)), images(3, 32)
    scores = methods.explain("libragrad", classifier, pixel_values, CLASS_IDX, 4)
    for b in range(3):
        alone = methods.explain("libragrad", classifier, pixel_values[b : b + 1], CLASS_IDX[b : b + 1], 4)[0]
        torch.testing.assert_close(scores[b], alone, rtol=0, atol=1e-5 * alone.abs().max().item())


def test_a_head_may_be_anything_that_has_a_gradient(fitted, images) -> None:
    classifier, pixel_values = split_classifier(fitted(_vit(), 32)), images(3, 32)
    head = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 5), nn.LogSoftmax(-1))
    scores = methods.explain("libragrad", classifier.with_head(head), pixel_values, CLASS_IDX, 4)
    plain = nn.Linear(32, 5, bias=False)  # the head's tangent at each image's embedding
    for b in range(3):
        embedding = classifier.embed(pixel_values[b : b + 1]).detach().requires_grad_()
        (slope,) = torch.autograd.grad(head(embedding)[0, CLASS_IDX[b]], embedding)
        with torch.no_grad():
            plain.weight[CLASS_IDX[b]] = slope[0]
        tangent = classifier.with_head(plain)
        expected = methods.explain("libragrad", tangent, pixel_values[b : b + 1], CLASS_IDX[b : b + 1], 4)[0]
        torch.testing.assert_close(scores[b], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_half_precision_gives_nearly_the_same(fitted, images) -> None:
    model, pixel_values = fitted(_vit(), 32), images(3, 32)
    full = methods.explain("libragrad", split_classifier(model), pixel_values, CLASS_IDX, 4)
    half = methods.explain("libragrad", split_classifier(model.bfloat16()), pixel_values.bfloat16(), CLASS_IDX, 4)
    assert half.dtype == torch.float32
    for b in range(3):
        assert torch.corrcoef(torch.stack([full[b].flatten(), half[b].flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_an_activation_that_is_a_gate_by_itself_is_a_constant_of_its_token(fitted, images, activation) -> None:
    """So contributions still sum to the output, or it would be refused."""
    classifier = split_classifier(fitted(_vit(hidden_act=activation), 32))
    assert methods.explain("libragrad", classifier, images(3, 32), CLASS_IDX, 4).any()


def test_what_has_no_rule_is_refused(fitted, images) -> None:
    model = fitted(_vit(hidden_act="mish"), 32)
    classifier = split_classifier(model)
    with left_as_found(model), pytest.raises(ValueError, match="has no rule for, such as .*; use another method"):
        methods.explain("libragrad", classifier, images(3, 32), CLASS_IDX, 4)
