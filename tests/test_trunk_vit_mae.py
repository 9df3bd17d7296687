"""The Mask-AutoEncoder trunk against hand-written loops and transformers' own ViTMAE."""

import pytest
import torch
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel
from trunks import BATCH, DIM, MAE, backbone_config, build, inputs_for, mae_config

from tve_hf.modeling_tve import TVEExplainer
from tve_hf.trunk_vit_mae import TVEMixerLayer


def test_autoencoder_equals_vit_mae_however_that_shuffles() -> None:
    config = mae_config()
    explainer, inputs = build(config), inputs_for(config)
    autoencoder = explainer.trunk.autoencoders[0]
    reference = ViTMAEForPreTraining(ViTMAEConfig(**MAE, mask_ratio=0.0)).eval()
    reference.vit.load_state_dict(autoencoder.encoder.state_dict())
    incompatible = reference.decoder.load_state_dict(autoencoder.decoder.state_dict(), strict=False)
    assert set(incompatible.missing_keys) == {"mask_token", "decoder_pred.weight", "decoder_pred.bias"}
    reference.decoder.decoder_pred = nn.Identity()
    # transformers shuffles the patches and restores their order, so this holds only if ours never lost it.
    encoded = reference.vit(inputs["pixel_values"], noise=torch.rand(BATCH, 16))
    tokens = reference.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
    torch.testing.assert_close(autoencoder(inputs["pixel_values"])[:, 1:], tokens, rtol=1e-4, atol=1e-5)


def test_encoder_equals_vit_mae_with_increasing_noise() -> None:
    config = mae_config()
    encoder, inputs = build(config).trunk.autoencoders[0].encoder, inputs_for(config)
    reference = ViTMAEModel(ViTMAEConfig(**MAE, mask_ratio=0.0)).eval()
    reference.load_state_dict(encoder.state_dict())
    noise = torch.linspace(0, 1, 16).expand(BATCH, -1)
    out = reference(inputs["pixel_values"], noise=noise)
    assert torch.equal(out.ids_restore, torch.arange(16).expand(BATCH, -1))
    assert torch.equal(encoder(inputs["pixel_values"], noise=noise).last_hidden_state, out.last_hidden_state)


@pytest.mark.parametrize("where", ["encoder.embeddings.position_embeddings", "decoder.decoder_pos_embed"])
def test_fresh_positions_are_sines_and_cosines(where) -> None:
    positions = build(mae_config(), spread=False).trunk.autoencoders[0].get_parameter(where)
    _, num_tokens, dim = positions.shape
    assert not positions.requires_grad
    assert num_tokens == 17
    assert torch.equal(positions[0, 0], torch.zeros(dim))
    for patch in range(16):
        for i in range(dim // 4):
            omega = 10000.0 ** (-i / (dim // 4))
            row, col = torch.tensor(omega * (patch // 4)), torch.tensor(omega * (patch % 4))
            expected = torch.stack([col.sin(), col.cos(), row.sin(), row.cos()])
            torch.testing.assert_close(positions[0, 1 + patch, i :: dim // 4], expected)


def test_mixer_layer_equals_a_loop() -> None:
    torch.manual_seed(0)
    layer = TVEMixerLayer(in_dim=6, out_dim=6, num_tokens=5, activation=nn.GELU(), eps=1e-6, skip=True)
    hidden = torch.randn(BATCH, 5, 6)
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (hidden.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    channels = torch.einsum("btc,dc->btd", normed, layer.channels.weight) + layer.channels.bias
    channels = nn.functional.gelu(channels)
    expected = torch.empty_like(hidden)
    for token in range(5):
        mixed = torch.einsum("btd,t->bd", channels, layer.tokens.weight[token]) + layer.tokens.bias[token]
        expected[:, token] = hidden[:, token] + nn.functional.gelu(mixed)
    torch.testing.assert_close(layer(hidden), expected)


def test_head_has_no_skip_at_its_ends_and_no_activation_in_its_last_layer() -> None:
    layers = build(mae_config(num_head_layers=4)).trunk.kept_head.layers
    assert [layer.skip for layer in layers] == [False, True, True, False]
    assert [isinstance(layer.activation, nn.Identity) for layer in layers] == [False, False, False, True]
    assert [layer.channels.in_features for layer in layers] == [8, DIM, DIM, DIM]


def test_trunk_drops_the_class_token_last() -> None:
    config = mae_config()
    explainer, inputs = build(config), inputs_for(config)
    hidden = explainer.trunk.autoencoders[0](inputs["pixel_values"])
    assert hidden.shape == (BATCH, 17, 8)
    for layer in explainer.trunk.kept_head.layers:
        hidden = layer(hidden)
    assert torch.equal(explainer(**inputs).kept, hidden[:, 1:])


def test_two_autoencoders_serve_one_head_each() -> None:
    config = mae_config(shared_trunk=False)
    explainer, inputs = build(config), inputs_for(config)
    before = explainer(**inputs)
    with torch.no_grad():
        explainer.trunk.autoencoders[1].encoder.embeddings.cls_token.add_(1.0)
    after = explainer(**inputs)
    assert torch.equal(after.kept, before.kept)
    assert not torch.equal(after.removed, before.removed)


def test_pixel_trunk_ignores_the_backbones_outputs() -> None:
    config = mae_config()
    explainer, inputs = build(config), inputs_for(config)
    out = explainer(**inputs, features=(torch.randn(BATCH, 1, 1, 1),), embeddings=torch.randn(BATCH, DIM))
    assert torch.equal(out.kept, explainer(**inputs).kept)
    assert explainer.empty_embedding is None


@pytest.mark.parametrize("shared", [True, False])
def test_from_vit_mae_copies_encoder_and_decoder(tmp_path, shared) -> None:
    torch.manual_seed(0)
    checkpoint = ViTMAEForPreTraining(ViTMAEConfig(**MAE))
    with torch.no_grad():
        for parameter in checkpoint.parameters():
            parameter.add_(torch.randn_like(parameter))
    checkpoint.save_pretrained(tmp_path)
    explainer = TVEExplainer.from_vit_mae(str(tmp_path), mae_config(shared_trunk=shared))
    assert len(explainer.trunk.autoencoders) == (1 if shared else 2)
    for autoencoder in explainer.trunk.autoencoders:
        for name, value in autoencoder.encoder.state_dict().items():
            assert torch.equal(value, checkpoint.vit.state_dict()[name]), name
        for name, value in autoencoder.decoder.state_dict().items():
            assert torch.equal(value, checkpoint.decoder.state_dict()[name]), name


def test_from_vit_mae_refuses_what_does_not_fit(tmp_path) -> None:
    ViTMAEForPreTraining(ViTMAEConfig(**MAE)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no Mask-AutoEncoder"):
        TVEExplainer.from_vit_mae(str(tmp_path), backbone_config())
    for change in ({"hidden_size": 32}, {"num_hidden_layers": 1}, {"decoder_num_hidden_layers": 3}):
        with pytest.raises(ValueError, match="does not fit config.mae_config at .*set mae_config="):
            TVEExplainer.from_vit_mae(str(tmp_path), mae_config(mae_config=MAE | change))


def test_pixel_trunk_refuses_wrong_images() -> None:
    explainer = build(mae_config())
    with pytest.raises(ValueError, match="pixel_values are missing"):
        explainer(embeddings=torch.zeros(BATCH, DIM))
    with pytest.raises(ValueError, match=r"expected \(B, 3, 16, 16\)"):
        explainer(torch.zeros(BATCH, 3, 32, 32))
