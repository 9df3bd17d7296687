"""What TVEExplainer promises whatever its trunk: Eq. 8 against a loop, and itself after a round trip."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from trunks import BATCH, CONFIGS, DIM, build, inputs_for

from tve_hf.configuration_tve import TVEConfig
from tve_hf.modeling_tve import TRUNKS, TVEExplainer, TVEExplainerOutput


def counted(function: Callable, calls: list[int]) -> Callable:
    def wrapper(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return wrapper


@pytest.fixture(params=CONFIGS, ids=str)
def config(request) -> TVEConfig:
    return CONFIGS[request.param]()


def test_every_trunk_name_has_a_class() -> None:
    assert set(TRUNKS) == {"backbone", "vit_mae"}


def test_shapes_and_determinism_in_training_mode(config) -> None:
    explainer, inputs = build(config).train(), inputs_for(config)
    first, second = explainer(**inputs), explainer(**inputs)
    assert isinstance(first, TVEExplainerOutput)
    assert first.kept.shape == first.removed.shape == (BATCH, config.num_patches, DIM)
    assert torch.equal(first.kept, second.kept)
    assert torch.equal(first.removed, second.removed)
    assert not torch.allclose(first.kept, first.removed)
    assert first.loss is None


def test_return_dict_false_gives_a_tuple(config) -> None:
    explainer, inputs = build(config), inputs_for(config)
    kept, removed = explainer(**inputs, return_dict=False)
    assert torch.equal(kept, explainer(**inputs).kept)
    assert torch.equal(removed, explainer(**inputs).removed)


def test_loss_is_equation_8_written_as_a_loop(config) -> None:
    explainer, inputs = build(config), inputs_for(config)
    patch_idx = torch.tensor([[0, 3, config.num_patches - 1], [2, 2, 7]])
    kept_labels, removed_labels = torch.randn(2, BATCH, 3, DIM, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        every = explainer(**inputs)
        out = explainer(**inputs, patch_idx=patch_idx, kept_labels=kept_labels, removed_labels=removed_labels)
    kept_loss = removed_loss = 0.0
    for image in range(BATCH):
        for sample in range(3):
            patch = int(patch_idx[image, sample])
            for d in range(DIM):
                kept_loss += float(every.kept[image, patch, d] - kept_labels[image, sample, d]) ** 2 / (BATCH * 3)
                removed_loss += float(every.removed[image, patch, d] - removed_labels[image, sample, d]) ** 2 / (
                    BATCH * 3
                )
    assert out.kept_loss.item() == pytest.approx(kept_loss, rel=1e-5)
    assert out.removed_loss.item() == pytest.approx(removed_loss, rel=1e-5)
    assert out.loss.item() == pytest.approx(kept_loss + removed_loss, rel=1e-5)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_patches_asked_for_are_predicted_as_among_all(config, layers) -> None:
    config.num_hidden_layers = layers
    explainer, inputs = build(config), inputs_for(config)
    patch_idx = torch.tensor([[0, 3, config.num_patches - 1], [2, 2, 7]])
    with torch.no_grad():
        every, some = explainer(**inputs), explainer(**inputs, patch_idx=patch_idx)
    assert some.loss is None
    for name in ("kept", "removed"):
        expected = torch.stack([every[name][image, patches] for image, patches in enumerate(patch_idx)])
        torch.testing.assert_close(some[name], expected)


def test_labels_without_indices_are_of_all_patches(config) -> None:
    explainer, inputs = build(config), inputs_for(config)
    labels = torch.zeros(BATCH, config.num_patches, DIM)
    every = torch.arange(config.num_patches).expand(BATCH, -1)
    implicit = explainer(**inputs, kept_labels=labels, removed_labels=labels)
    explicit = explainer(**inputs, kept_labels=labels, removed_labels=labels, patch_idx=every)
    assert torch.equal(implicit.loss, explicit.loss)


def test_every_weight_gets_a_gradient(config) -> None:
    explainer, inputs = build(config).train(), inputs_for(config)
    labels = torch.ones(BATCH, config.num_patches, DIM)
    explainer(**inputs, kept_labels=labels, removed_labels=labels).loss.backward()
    without = [name for name, p in explainer.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_round_trip_is_bit_identical(config, tmp_path) -> None:
    explainer, inputs = build(config), inputs_for(config)
    explainer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded, info = TVEExplainer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.state_dict().keys() == explainer.state_dict().keys()
    for name, value in explainer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(**inputs).kept, explainer(**inputs).kept)
    assert torch.equal(loaded(**inputs).removed, explainer(**inputs).removed)


def test_auto_model_round_trip(config, tmp_path) -> None:
    AutoConfig.register("tve", TVEConfig, exist_ok=True)
    AutoModel.register(TVEConfig, TVEExplainer, exist_ok=True)
    explainer, inputs = build(config), inputs_for(config)
    explainer.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, TVEExplainer)
    assert torch.equal(loaded(**inputs).kept, explainer(**inputs).kept)


def test_bfloat16_stays_near_float32(config, tmp_path) -> None:
    explainer, inputs = build(config), inputs_for(config)
    explainer.save_pretrained(tmp_path)
    half = TVEExplainer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    labels = torch.zeros(BATCH, config.num_patches, DIM)
    expected, out = explainer(**inputs), half(**inputs, kept_labels=labels, removed_labels=labels)
    assert out.loss.dtype == torch.float32
    for name in ("kept", "removed"):
        error = (out[name].float() - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(config, use_reentrant) -> None:
    plain, inputs = build(config).train(), inputs_for(config)
    frugal = copy.deepcopy(plain)
    frugal.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls: list[int] = []
    for module in frugal.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = counted(module._gradient_checkpointing_func, calls)
    labels = torch.ones(BATCH, config.num_patches, DIM)
    for explainer in (plain, frugal):
        explainer(**inputs, kept_labels=labels, removed_labels=labels).loss.backward()
    assert calls
    for (name, expected), actual in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(actual.grad, expected.grad, msg=name)


def test_attention_implementation_reaches_every_layer(config, monkeypatch) -> None:
    explainer, inputs = build(config), inputs_for(config)
    assert explainer.config._attn_implementation == "sdpa"
    calls: list[int] = []
    fused = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted(fused, calls))
    sdpa = explainer(**inputs)
    num_layers = sum(hasattr(module, "attention") for module in explainer.modules())
    assert len(calls) == num_layers
    explainer.set_attn_implementation("eager")
    eager = explainer(**inputs)
    assert len(calls) == num_layers
    torch.testing.assert_close(eager.kept, sdpa.kept, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(eager.removed, sdpa.removed, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles_in_one_graph(config) -> None:
    explainer, inputs = build(config), inputs_for(config)
    labels = torch.ones(BATCH, config.num_patches, DIM)
    inputs |= {"kept_labels": labels, "removed_labels": labels}
    with torch.no_grad():
        expected = explainer(**inputs)
        actual = torch.compile(explainer, fullgraph=True)(**inputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_any_batch_size(config, strict) -> None:
    explainer, inputs = build(config), inputs_for(config)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {
        name: tuple({0: batch} for _ in value) if isinstance(value, tuple) else {0: batch}
        for name, value in inputs.items()
    }
    with torch.no_grad():
        exported = torch.export.export(explainer, (), inputs, dynamic_shapes=shapes, strict=strict).module()
        larger = {
            name: tuple(torch.cat([v, v]) for v in value) if isinstance(value, tuple) else torch.cat([value, value])
            for name, value in inputs.items()
        }
        for trial in (inputs, larger):
            expected, actual = explainer(**trial), exported(**trial)
            torch.testing.assert_close(actual["kept"], expected.kept, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(actual["removed"], expected.removed, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_loads_as_remote_code_where_the_package_is_not_installed(config, tmp_path, monkeypatch) -> None:
    for auto_class, cls in (("AutoConfig", TVEConfig), ("AutoModel", TVEExplainer)):
        monkeypatch.setattr(cls, "_auto_class", auto_class)
    explainer, inputs = build(config), inputs_for(config)
    explainer.save_pretrained(tmp_path / "model")
    torch.save({"inputs": inputs, "kept": explainer(**inputs).kept.detach()}, tmp_path / "expected.pt")
    script = """
import sys, torch
sys.modules["tve_hf"] = None
from transformers import AutoModel
model = AutoModel.from_pretrained("model", trust_remote_code=True)
expected = torch.load("expected.pt")
assert torch.equal(model(**expected["inputs"]).kept, expected["kept"])
assert type(model).__module__.startswith("transformers_modules.")
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert {path.name for path in Path(tmp_path / "model").glob("*.py")} == {
        "configuration_tve.py",
        "modeling_tve.py",
        "trunk_backbone.py",
        "trunk_vit_mae.py",
        "weights.py",
    }
