"""Attention methods against slow implementations of their equations, and on every kind of transformer."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from slow_attention import SLOW, SLOW_METHODS, Run, pooled_by_attention, slow_chefer, slow_legrad
from torch import Tensor, nn
from untouched import left_as_found
from zero_shot_models import POSITIONS, make_model, make_processor

from tve_hf import methods
from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.methods._weights import Recorder, eager_attention

CLASS_IDX = torch.tensor([1, 3])
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
PATCHES = {"image_size": 32, "patch_size": 8}
LRP = ["partial_lrp", "transformer_attribution"]
READ_EVERY_BLOCK = ["rollout", "chefer_cam", "legrad", "libragrad", "text_span"]
ATTENTION_METHODS = ["raw_attention", "attention_cam", *READ_EVERY_BLOCK, *LRP]


class Cosine(nn.Module):
    """A zero-shot head: scaled cosines with the embeddings of texts."""

    def __init__(self, dim: int, num_labels: int = 5):
        super().__init__()
        self.text = nn.Parameter(torch.randn(num_labels, dim))

    def forward(self, embeddings: Tensor) -> Tensor:
        return 20 * nn.functional.normalize(embeddings, dim=-1) @ nn.functional.normalize(self.text, dim=-1).T


class Tower(nn.Module):
    """An image tower with a zero-shot head, as CLIP and SigLIP are used."""

    def __init__(self, tower: nn.Module, output: str, dim: int):
        super().__init__()
        self.tower, self.output, self.head, self.config = tower, output, Cosine(dim), tower.config

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.tower(pixel_values)[self.output])


def _siglip_vision(**values: Any) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**SIZES, **PATCHES, **values)


def _text() -> dict:
    return SIZES | {"vocab_size": 10, "num_hidden_layers": 1}


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **PATCHES, num_labels=5)),
    "vit_msn": lambda: hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**SIZES, **PATCHES, num_labels=5)),
    "deit": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SIZES, **PATCHES, num_labels=5)),
    "beit": lambda: hf.BeitForImageClassification(
        hf.BeitConfig(**SIZES, **PATCHES, num_labels=5, use_relative_position_bias=True, layer_scale_init_value=0.1)
    ),
    "data2vec": lambda: hf.Data2VecVisionForImageClassification(
        hf.Data2VecVisionConfig(**SIZES, **PATCHES, num_labels=5, use_relative_position_bias=True)
    ),
    "data2vec_eager": lambda: hf.Data2VecVisionForImageClassification._from_config(
        hf.Data2VecVisionConfig(**SIZES, **PATCHES, num_labels=5), attn_implementation="eager"
    ),
    "dinov2_with_registers": lambda: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(
            **PATCHES, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, num_labels=5
        )
    ),
    "clip_classifier": lambda: hf.CLIPForImageClassification(
        hf.CLIPConfig(vision_config=SIZES | PATCHES, text_config=_text(), num_labels=5)
    ),
    "siglip_classifier": lambda: hf.SiglipForImageClassification(
        hf.SiglipConfig(vision_config=SIZES | PATCHES, text_config=_text(), num_labels=5)
    ),
    "clip": lambda: Tower(
        hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**SIZES, **PATCHES, projection_dim=24)),
        "image_embeds",
        24,
    ),
    "siglip": lambda: Tower(hf.SiglipVisionModel(_siglip_vision()), "pooler_output", 32),
}


@pytest.fixture(scope="module")
def classifier_of(fitted, processor_of) -> Callable[[str], SplitClassifier]:
    """Tiny split classifiers by name, built once."""
    built: dict[str, SplitClassifier] = {}

    def get(name: str) -> SplitClassifier:
        if name not in built:
            model = fitted(BUILDERS[name](), 32)
            built[name] = split_classifier(model, processor_of(3, 32, 32))
        return built[name]

    return get


# --- against slow implementations -----------------------------------------------------------------------------------


def _assert_same(scores: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0
    torch.testing.assert_close(scores, expected.detach(), rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("method", SLOW_METHODS)
def test_equals_a_slow_one(classifier_of, images, method, name) -> None:
    classifier, pixel_values = classifier_of(name), images(2, 32)
    scores = methods.explain(method, classifier, pixel_values, CLASS_IDX, 4)
    for b in range(2):
        run = Run(name, classifier, pixel_values[b], int(CLASS_IDX[b]))
        _assert_same(scores[b], SLOW_METHODS[method](run))


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_some_layers_alone(classifier_of, images, name) -> None:
    classifier, pixel_values = classifier_of(name), images(2, 32)
    legrad = methods.explain("legrad", classifier, pixel_values, CLASS_IDX, 4, layers=[-1, 1])
    inner = methods.explain("legrad", classifier, pixel_values, CLASS_IDX, 4, layers=[1])
    chefer = methods.explain("chefer_cam", classifier, pixel_values, CLASS_IDX, 4, start_layer=-2)
    for b in range(2):
        run = Run(name, classifier, pixel_values[b], int(CLASS_IDX[b]))
        _assert_same(legrad[b], slow_legrad(run, (1, 3)))
        _assert_same(inner[b], slow_legrad(run, (1,)))
        _assert_same(chefer[b], slow_chefer(run, 2))


# --- LeGrad: what upstream's code does, and the correction ----------------------------------------------------------


def _scaled(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_upstream_pools_the_mean_of_all_tokens_before_the_norm(classifier_of, images, name) -> None:
    classifier, pixel_values = classifier_of(name), images(2, 32)
    scores = methods.explain("legrad", classifier, pixel_values, CLASS_IDX, 4, upstream=True)
    for b in range(2):
        run = Run(name, classifier, pixel_values[b], int(CLASS_IDX[b]))
        total = torch.zeros(17)
        for layer in (2, 3):
            mean = run.tokens[layer].mean(1, keepdim=True)  # the one token that the model then pools
            score = run.plain.logits(mean)[0, run.index]
            (slope,) = torch.autograd.grad(score, run.maps[layer], retain_graph=True)
            total += slope[0].clamp(min=0).mean((0, 1))
        _assert_same(scores[b], _scaled(total[1:]).view(4, 4))


def test_upstream_pools_by_attention_without_the_last_norm(classifier_of, images) -> None:
    classifier, pixel_values = classifier_of("siglip"), images(2, 32)
    scores = methods.explain("legrad", classifier, pixel_values, CLASS_IDX, 4, upstream=True)
    for b in range(2):
        run = Run("siglip", classifier, pixel_values[b], int(CLASS_IDX[b]))
        total = torch.zeros(16)
        for layer in (2, 3):
            embedding, attention = pooled_by_attention(classifier.backbone.model.tower.head, run.tokens[layer])
            (slope,) = torch.autograd.grad(run.plain.head(embedding)[0, run.index], attention)
            total += slope[0].clamp(min=0).mean((0, 1))
            run = Run("siglip", classifier, pixel_values[b], int(CLASS_IDX[b]))
        _assert_same(scores[b], _scaled(total).view(4, 4))


def test_an_empty_prompt_silences_what_it_finds_itself(classifier_of, images) -> None:
    classifier, pixel_values = classifier_of("siglip"), images(2, 32)
    direction = torch.randn(32, 1, generator=torch.Generator().manual_seed(3))

    def empty_head(embeddings: Tensor) -> Tensor:
        return embeddings @ direction

    plain = methods.explain("legrad", classifier, pixel_values, CLASS_IDX, 4)
    empty = methods.explain("legrad", classifier.with_head(empty_head), pixel_values, CLASS_IDX * 0, 4)
    scores = methods.explain("legrad", classifier, pixel_values, CLASS_IDX, 4, empty_head=empty_head)
    for b in range(2):
        loud = _scaled(empty[b]) > 0.8
        assert 0 < loud.sum() < 16
        assert (scores[b][loud] == 0).all()
        torch.testing.assert_close(scores[b][~loud], plain[b][~loud])


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_legrad_asks_a_zero_shot_model_what_its_prompts_say(fitted, images, name) -> None:
    """The whole classes, prompts and all, against the equations on what their vision towers return."""
    model, processor, pixel_values = fitted(make_model(name), 32), make_processor(name), images(2, 32)
    classifier = split_classifier(model, processor, candidate_labels=["a cat", "two dogs", "a red chair"])
    index = torch.tensor([2, 0])
    empty_head = classifier.with_prompts(["a photo of a"], "{}").head
    options = {"layers": [0, -1], "empty_head": empty_head}
    scores = methods.explain("legrad", classifier, pixel_values, index, 4, **options)

    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    vision = eager.vision_model
    output = vision(pixel_values, output_hidden_states=True, output_attentions=True)
    sentences = ["This is a photo of a cat.", "This is a photo of two dogs.", "This is a photo of a red chair."]

    def directions(texts: list[str]) -> Tensor:
        pad = {"padding": "max_length", "max_length": POSITIONS} if name == "siglip" else {"padding": True}
        tokens = processor.tokenizer(texts, return_tensors="pt", **pad)
        found = model.get_text_features(**tokens)
        return nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)

    def slow(texts: Tensor, b: int) -> Tensor:  # texts (2, D), one for each image
        total = torch.zeros(16)
        for layer in (0, 2):
            tokens = output.hidden_states[layer + 1]
            if name == "clip":
                attention = output.attentions[layer]
                embedding = model.visual_projection(vision.post_layernorm(tokens[:, 0]))
            else:
                embedding, attention = pooled_by_attention(vision.head, vision.post_layernorm(tokens))
            score = (nn.functional.normalize(embedding, dim=-1) * texts).sum(-1)[b] * model.logit_scale.exp()
            (slope,) = torch.autograd.grad(score, attention, retain_graph=True)
            total += slope[b].clamp(min=0).mean((0, 1))[-16:] / 2
        return total.view(4, 4)

    prompts = directions(sentences)
    empty = directions(["a photo of a"])
    for b in range(2):
        loud = _scaled(slow(empty.expand(2, -1), b)) > 0.8
        assert 0 < loud.sum() < 16
        _assert_same(scores[b], slow(prompts[index], b).masked_fill(loud, 0))


# --- TextSpan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "clip"])
@torch.no_grad()
def test_text_span_sums_contributions_by_head_layer_and_token(classifier_of, images, name) -> None:
    classifier, pixel_values = classifier_of(name), images(2, 32)
    model = classifier.backbone.model
    scores = methods.explain("text_span", classifier, pixel_values, CLASS_IDX, 4, layers=[1, -1])
    for b in range(2):
        run = Run(name, classifier, pixel_values[b], int(CLASS_IDX[b]))
        tokens = [run.plain.start(pixel_values[b : b + 1]), *run.tokens]
        if name == "vit":
            norm, weight = model.vit.layernorm, model.classifier.weight
        else:
            norm, head = model.tower.vision_model.post_layernorm, model.head
            embedding = model.tower.visual_projection(norm(tokens[-1][:, 0]))[0]
            weight = 20 * nn.functional.normalize(head.text, dim=-1) / embedding.norm()
            weight = weight @ model.tower.visual_projection.weight
        direction = weight[CLASS_IDX[b]] - weight.mean(0)
        spread = (tokens[-1][0, 0].var(correction=0) + norm.eps).sqrt()
        direction = direction * norm.weight / spread  # of a token in the residual stream
        expected = torch.zeros(16)
        for layer in (1, 3):
            block = run.plain.blocks[layer]
            if name == "vit":
                normed, attention = block.layernorm_before(tokens[layer])[0], block.attention
                out_weight = attention.o_proj.weight
            else:
                normed, attention = block.layer_norm1(tokens[layer])[0], block.self_attn
                out_weight = attention.out_proj.weight
            values = attention.v_proj(normed)  # (T, D)
            for head in range(2):
                part = slice(16 * head, 16 * head + 16)
                for n in range(16):
                    moved = run.maps[layer][0, head, 0, n + 1] * values[n + 1, part] @ out_weight[:, part].T
                    expected[n] += moved @ direction
        _assert_same(scores[b], expected.view(4, 4))


def test_text_span_is_refused_where_no_token_adds_directly(classifier_of, images) -> None:
    with pytest.raises(ValueError, match="pools its tokens by attention, .* such as legrad"):
        methods.explain("text_span", classifier_of("siglip"), images(2, 32), CLASS_IDX, 4)
    mlp = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5))
    with pytest.raises(ValueError, match="is not linear, as text_span needs; use another, such as legrad"):
        methods.explain("text_span", classifier_of("vit").with_head(mlp), images(2, 32), CLASS_IDX, 4)


# --- every kind of transformer --------------------------------------------------------------------------------------


def _implementations(model: nn.Module) -> list:
    """The attention implementation of every config that any module holds, in order."""
    return [
        (name, key, value._attn_implementation)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, hf.PreTrainedConfig)
    ]


# text_span refuses siglip, as is tested above.
@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m in ATTENTION_METHODS for n in BUILDERS if (m, n) != ("text_span", "siglip")]
)
def test_serves_unmodified_classes_and_leaves_them_as_found(classifier_of, images, method, name) -> None:
    classifier, pixel_values = classifier_of(name), images(2, 32)
    model = classifier.backbone.model
    before = _implementations(model)
    with left_as_found(model), torch.no_grad():
        scores = methods.explain(method, classifier, pixel_values, CLASS_IDX, 4)
    assert _implementations(model) == before
    assert scores.shape == (2, 4, 4)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert torch.isfinite(scores).all() and (scores.flatten(1).std(1) > 0).all()
    for b in range(2):
        alone = methods.explain(method, classifier, pixel_values[b : b + 1], CLASS_IDX[b : b + 1], 4)[0]
        torch.testing.assert_close(alone, scores[b], rtol=1e-3, atol=1e-5 * scores.abs().max().item())


@pytest.mark.parametrize("method", ATTENTION_METHODS)
def test_an_error_restores_what_every_config_said(classifier_of, images, method) -> None:
    model = copy.deepcopy(classifier_of("siglip_classifier").backbone.model)
    classifier = split_classifier(model)
    model.vision_model.config = copy.deepcopy(model.vision_model.config)  # a derived config that no other module holds
    model.vision_model.config._attn_implementation = "flash_attention_2"
    before = _implementations(model)
    assert len({implementation for *_, implementation in before}) == 2

    def fail(*_: Any) -> None:
        raise RuntimeError("from the inside")

    model.classifier.register_forward_pre_hook(fail)
    with left_as_found(model), pytest.raises(RuntimeError, match="from the inside"):
        methods.explain(method, classifier, images(2, 32), CLASS_IDX, 4)
    assert _implementations(model) == before


def test_attention_is_eager_in_every_config_inside_the_block(classifier_of) -> None:
    model = copy.deepcopy(classifier_of("siglip_classifier").backbone.model)
    model.vision_model.encoder.layers[1].self_attn.config = copy.deepcopy(model.vision_model.config)
    before = _implementations(model)
    assert "sdpa" in {implementation for *_, implementation in before}
    with eager_attention(model):
        assert {implementation for *_, implementation in _implementations(model)} == {"eager"}
    assert _implementations(model) == before


class OwnAttention(nn.Module):
    """A block outside of any library, which calls torch's fused attention with a mask or a scale of its own."""

    def __init__(self, **options: Any):
        super().__init__()
        self.norm, self.qkv, self.out, self.options = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32), options

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(tokens)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, **self.options)
        return tokens + self.out(mixed.transpose(1, 2).flatten(2))


class OwnTransformer(nn.Module):
    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 32, 8, 8), nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens).mean(1))


def test_fused_attention_is_written_out_as_it_was(fitted, processor_of, images) -> None:
    seen = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) > 0.3
    masks = [{}, {"scale": 0.7}, {"attn_mask": seen}, {"attn_mask": 0.3 * seen.float(), "dropout_p": 0.0}]
    model = fitted(OwnTransformer([OwnAttention(**options) for options in masks]), 32)
    classifier, pixel_values = split_classifier(model, processor_of(3, 32, 32)), images(2, 32)
    recorder = Recorder()
    handles = [recorder.hook(block.out, str(i)) for i, block in enumerate(model.blocks)]
    with recorder:
        logits = model(pixel_values)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits, model(pixel_values))
    assert [name for name, _ in recorder.seen] == list("0123")
    for _, weights in recorder.seen:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 16))
    assert not recorder.seen[2][1][..., ~seen].any()
    for method in ATTENTION_METHODS:
        with left_as_found(model):
            assert (methods.explain(method, classifier, pixel_values, CLASS_IDX, 4).flatten(1).std(1) > 0).all()


def test_torch_blocks_of_multihead_attention_are_read(fitted, processor_of, images) -> None:
    layers = [nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True, norm_first=True) for _ in range(2)]
    model = fitted(OwnTransformer(layers), 32)
    classifier, pixel_values = split_classifier(model, processor_of(3, 32, 32)), images(2, 32)
    tokens, steps = model.patches(pixel_values).flatten(2).transpose(1, 2), []
    with torch.no_grad():
        for layer in layers:
            normed = layer.norm1(tokens)
            mean = layer.self_attn(normed, normed, normed)[1]  # torch averages over heads
            steps.append(nn.functional.normalize(mean + torch.eye(16), p=1, dim=-1))
            tokens = layer(tokens)
        scores = methods.explain("rollout", classifier, pixel_values, CLASS_IDX, 4)
    torch.testing.assert_close(scores, (steps[1] @ steps[0]).mean(1).view(2, 4, 4))


@pytest.mark.parametrize("method", ATTENTION_METHODS)
def test_where_a_model_attends_is_found_once(fitted, processor_of, images, method) -> None:
    classifier = split_classifier(fitted(BUILDERS["vit"](), 32), processor_of(3, 32, 32))
    passes: list[Tensor] = []
    classifier.backbone.model.register_forward_hook(lambda *call: passes.append(call[2].logits))
    counts, maps = [], []
    for batch in (images(2, 32), images(2, 32), images(1, 32)):
        passes.clear()
        maps.append(methods.explain(method, classifier, batch, CLASS_IDX[: len(batch)], 4))
        counts.append(len(passes))
    assert counts[0] == counts[1] + 1 == counts[2] + 1  # which took a pass of its own
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=0)


@pytest.mark.parametrize("method", [*ATTENTION_METHODS, "grad_cam"])
def test_inference_mode_is_refused(classifier_of, images, method) -> None:
    classifier, pixel_values = classifier_of("vit"), images(2, 32)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode.* rules out; use torch.no_grad"):
        methods.explain(method, classifier, pixel_values, CLASS_IDX, 4)
    with torch.inference_mode():
        born_there = pixel_values.clone()
    expected = methods.explain(method, classifier, pixel_values, CLASS_IDX, 4)
    torch.testing.assert_close(methods.explain(method, classifier, born_there, CLASS_IDX, 4), expected)


@pytest.mark.parametrize("method", ATTENTION_METHODS)
def test_a_cnn_is_refused(shared_model, images, method) -> None:
    classifier = split_classifier(shared_model("cnn"))
    with pytest.raises(ValueError, match=r"has no attention of a class token to all patches.*; use another, such as"):
        methods.explain(method, classifier, images(2, 32), CLASS_IDX, 4)


@pytest.mark.parametrize("layers", [[4], [-5], []])
@pytest.mark.parametrize("method", ["legrad", "text_span"])
def test_layers_that_do_not_exist_are_refused(classifier_of, images, method, layers) -> None:
    with pytest.raises(ValueError, match="must name some of the 4 blocks"):
        methods.explain(method, classifier_of("vit"), images(2, 32), CLASS_IDX, 4, layers=layers)


@pytest.mark.parametrize("start_layer", [4, -5])
@pytest.mark.parametrize("method", ["chefer_cam", "transformer_attribution"])
def test_a_start_layer_that_does_not_exist_is_refused(classifier_of, images, method, start_layer) -> None:
    with pytest.raises(ValueError, match="is none of the 4 blocks"):
        methods.explain(method, classifier_of("vit"), images(2, 32), CLASS_IDX, 4, start_layer=start_layer)


# --- Swin -----------------------------------------------------------------------------------------------------------


def test_swin_shows_the_window_of_its_last_stage(shared_model, build, images) -> None:
    classifier, pixel_values = split_classifier(shared_model("swin")), images(2, 64)
    scores = methods.explain("raw_attention", classifier, pixel_values, CLASS_IDX, 2)
    eager = build("swin")
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        last = eager(pixel_values, output_attentions=True).attentions[-1]  # (B, heads, 4, 4): one window
    torch.testing.assert_close(scores, last.mean((1, 2)).view(2, 2, 2))
    cam = methods.explain("attention_cam", classifier, pixel_values, CLASS_IDX, 2)
    assert (cam.flatten(1).std(1) > 0).all()


@pytest.mark.parametrize("method", [*READ_EVERY_BLOCK, "transformer_attribution"])
def test_methods_that_read_every_block_refuse_windows(shared_model, images, method) -> None:
    with pytest.raises(ValueError, match="in every block, which this method reads; use another"):
        methods.explain(method, split_classifier(shared_model("swin")), images(2, 64), CLASS_IDX, 2)
