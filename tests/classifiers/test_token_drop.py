"""Dropped tokens against transformers run by hand on the tokens that stay."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import BeitConfig, BeitForImageClassification
from untouched import left_as_found

from tve_hf import exact_meta_attribution, fidelity, split_classifier
from tve_hf.classifiers.token_drop import find_token_input
from tve_hf.patches import TOKEN_DROP


def _keep(batch: int, num_masks: int, num_patches: int = 16) -> Tensor:
    keep = torch.rand(batch, num_masks, num_patches, generator=torch.Generator().manual_seed(2)) > 0.5
    keep[..., 3] = True
    return keep


@torch.no_grad()
def test_a_vit_is_run_by_hand_on_the_tokens_that_stay(shared_model, images) -> None:
    model = shared_model("vit")
    pixel_values, keep = images(2, 32), _keep(2, 6)
    keep[0, 0] = False  # the class token alone
    keep[1, 0] = True
    with left_as_found(model):
        found = split_classifier(model).embed_masked(pixel_values, keep, 4, TOKEN_DROP, chunk_size=2)
    assert found.shape == (2, 6, 32)
    for b in range(2):
        for k in range(6):
            tokens = model.vit.embeddings(pixel_values[b : b + 1])
            hidden = tokens[:, [0, *(1 + i for i in range(16) if keep[b, k, i])]]
            for layer in model.vit.layers:
                hidden = layer(hidden)
            torch.testing.assert_close(found[b, k], model.vit.layernorm(hidden)[0, 0], rtol=1e-4, atol=1e-5)
    whole = split_classifier(model).embed(pixel_values[1:])
    torch.testing.assert_close(found[1, :1], whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prefix_tokens_stay_and_means_are_over_the_tokens_that_stay(shared_model, images) -> None:
    model = shared_model("dinov2_with_registers")
    pixel_values, keep = images(1, 32), _keep(1, 4)
    found = split_classifier(model).embed_masked(pixel_values, keep, 4, TOKEN_DROP)
    inner = model.dinov2_with_registers
    for k in range(4):
        patches = [5 + i for i in range(16) if keep[0, k, i]]
        hidden = inner.encoder(inner.embeddings(pixel_values)[:, [0, 1, 2, 3, 4, *patches]]).last_hidden_state
        hidden = inner.layernorm(hidden)
        expected = torch.cat([hidden[0, 0], hidden[0, 5:].mean(0)])
        torch.testing.assert_close(found[0, k], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_patch_of_several_tokens_loses_all_of_them(shared_model, images) -> None:
    classifier = split_classifier(shared_model("deit"))
    keep = torch.tensor([[[True, False, False, True]]])
    tokens = torch.tensor([[[r // 2 == c // 2 for r in range(4) for c in range(4)]]])
    assert tokens.sum() == 8
    coarse = classifier.embed_masked(images(1, 32), keep, 2, TOKEN_DROP)
    torch.testing.assert_close(coarse, classifier.embed_masked(images(1, 32), tokens, 4, TOKEN_DROP))


class PlainTransformer(nn.Module):
    """Positions are added outside of modules, tokens go by keyword, and the head reads the first token or the mean."""

    def __init__(self, positions: bool = True, keyword: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.positions = nn.Parameter(torch.zeros(1, 16, 16)) if positions else None
        self.position_table = nn.Parameter(torch.zeros(1, 1, 16, 16))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 5)
        self.keyword = keyword

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)
        bias = self.position_table if self.positions is None else None
        tokens = tokens if self.positions is None else tokens + self.positions
        for block in self.blocks:
            tokens = block(hidden=tokens, bias=bias) if self.keyword else block(tokens, bias)
        return self.head(tokens.mean(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.mix = nn.Linear(16, 16)

    def forward(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = self.qkv(hidden).unsqueeze(1).chunk(3, -1)
        bias = None if bias is None else bias[..., : hidden.shape[1], : hidden.shape[1]]  # would not even raise
        return hidden + self.mix(nn.functional.scaled_dot_product_attention(q, k, v, bias).squeeze(1))


@torch.no_grad()
@pytest.mark.parametrize("keyword", [True, False])
def test_the_sequence_is_found_where_no_module_outputs_it(randomized, images, processor_of, keyword) -> None:
    model = randomized(PlainTransformer(keyword=keyword)).eval()
    keep = _keep(2, 5)
    found = split_classifier(model, processor_of(3, 32, 32)).embed_masked(images(2, 32), keep, 4, TOKEN_DROP)
    for b in range(2):
        for k in range(5):
            tokens = model.patches(images(2, 32)[b : b + 1]).flatten(2).transpose(1, 2) + model.positions
            tokens = tokens[:, keep[b, k]]
            for block in model.blocks:
                tokens = block(tokens, None)
            torch.testing.assert_close(found[b, k], tokens.mean(1)[0], rtol=1e-4, atol=1e-5)


def test_positions_within_attention_are_refused(randomized, images, processor_of) -> None:
    model = randomized(PlainTransformer(positions=False)).eval()
    with left_as_found(model), pytest.raises(ValueError, match="cannot be dropped from PlainTransformer"):
        split_classifier(model, processor_of(3, 32, 32)).embed_masked(images(1, 32), _keep(1, 1), 4, TOKEN_DROP)


def test_relative_position_bias_is_refused(fitted, images) -> None:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BeitConfig(image_size=32, patch_size=8, num_labels=5, use_relative_position_bias=True, **settings)
    model = fitted(BeitForImageClassification(config), 32)
    with pytest.raises(ValueError, match="cannot be dropped from Beit.* adds positions within its blocks"):
        split_classifier(model).embed_masked(images(1, 32), _keep(1, 1), 4, TOKEN_DROP)


@pytest.mark.parametrize("name", ["swin", "convnext", "resnet", "mobilenet_v2", "cnn"])
def test_what_has_no_token_sequence_is_refused_in_a_sentence_and_left_as_found(build, images, specs, name) -> None:
    model = build(name)
    side = specs[name].side if name in specs else 32
    classifier = split_classifier(model)
    with (
        left_as_found(model),
        pytest.raises(ValueError, match="is no vision transformer, or .* choose another removal"),
    ):
        classifier.embed_masked(images(1, side), _keep(1, 1), 4, TOKEN_DROP)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory; max_split_size_mb"), RuntimeError("CUDA error: unspecified")]
)
def test_a_failure_that_is_not_about_shapes_does_not_become_no_vision_transformer(build, images, error) -> None:
    """Memory that runs out, say, once tokens are dropped: 17 tokens go through, fewer do not."""
    model = build("vit")
    classifier = split_classifier(model)

    def fail(module: nn.Module, args: tuple) -> None:
        if args[0].shape[1] < 17:
            raise error

    for layer in model.vit.layers:
        layer.register_forward_pre_hook(fail)
    with pytest.raises(type(error), match="CUDA"):
        classifier.embed_masked(images(1, 32), _keep(1, 1), 4, TOKEN_DROP)


def test_nothing_to_average_is_refused(shared_model, images) -> None:
    classifier = split_classifier(shared_model("dinov2"))
    with pytest.raises(ValueError, match="averages patch tokens, so an image without any has no embedding"):
        classifier.embed_masked(images(1, 32), torch.zeros(1, 1, 16, dtype=torch.bool), 4, TOKEN_DROP)


def test_grids_and_shapes_that_do_not_fit_are_refused(shared_model, images) -> None:
    classifier = split_classifier(shared_model("vit"))
    with pytest.raises(ValueError, match="8 x 8 patches does not divide an image of 4 x 4 tokens"):
        classifier.embed_masked(images(1, 32), _keep(1, 1, 64), 8, TOKEN_DROP)
    with pytest.raises(ValueError, match=r"shape \(1, 16, 192\); token_drop takes images"):
        classifier.embed_masked(torch.zeros(1, 16, 192), _keep(1, 1), 4, TOKEN_DROP)


def test_the_name_serves_wherever_a_removal_is_named(shared_model, images) -> None:
    classifier = split_classifier(shared_model("vit"))
    pixel_values = images(1, 32)
    kept, removed = exact_meta_attribution(classifier, pixel_values, 4, 0, torch.tensor([[6]]), removal=TOKEN_DROP)
    only = torch.arange(16)[None, None] == 6
    torch.testing.assert_close(kept, classifier.embed_masked(pixel_values, only, 4, TOKEN_DROP).detach())
    torch.testing.assert_close(removed, classifier.embed_masked(pixel_values, ~only, 4, TOKEN_DROP).detach())
    scores = torch.arange(16.0).view(1, 4, 4)
    found = fidelity(classifier, pixel_values, scores, torch.tensor([0]), 5, removal=TOKEN_DROP)
    with torch.no_grad():
        keep = torch.stack([torch.ones(16) > 0, torch.arange(16) >= 4])[None]
        log_prob = classifier.log_prob(classifier.embed_masked(pixel_values, keep, 4, TOKEN_DROP))[0, :, 0]
    assert found.minus[0, 1].item() == pytest.approx((log_prob[0].exp() - log_prob[1].exp()).item(), abs=1e-6)


def test_a_model_is_not_kept_alive_by_what_is_remembered_of_it(build) -> None:
    classifier = split_classifier(build("vit"))
    assert find_token_input(classifier.backbone, classifier.probe()) == ("vit.layers.0", 1, 4, 4)
    model = weakref.ref(classifier.backbone.model)
    del classifier
    gc.collect()
    assert model() is None
