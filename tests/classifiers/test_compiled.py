"""Compiled passes: the same embeddings where they serve, the model as it was written everywhere else."""

import copy

import pytest
import torch
from tiny_models import TinyCNN
from torch import nn

from tve_hf import split_classifier
from tve_hf.benchmark.cost import counting
from tve_hf.classifiers.compiled import CompiledBackbone, with_compiled_passes


@pytest.fixture
def seen(monkeypatch):
    """The shapes of all batches that went through what stands for compiled code: the traced graph."""
    shapes = []

    def compiler(function, fullgraph, dynamic):
        assert fullgraph and dynamic

        def run(pixel_values):
            shapes.append(tuple(pixel_values.shape))
            return function(pixel_values)

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    return shapes


@torch.no_grad()
def test_masked_passes_are_compiled_and_have_the_same_embeddings(build, architecture, images, seen):
    model = build(architecture)
    plain = split_classifier(model)
    classifier = with_compiled_passes(plain)
    seen.clear()
    pixel_values = images(2, *plain.probe().shape[-2:])
    keep = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    found = classifier.embed_masked(pixel_values, keep, 2, chunk_size=4)
    torch.testing.assert_close(found, plain.embed_masked(pixel_values, keep, 2, chunk_size=4))
    assert sum(shape[0] for shape in seen) == 10
    assert classifier.backbone.model is model and classifier.fingerprint() == plain.fingerprint()


@pytest.fixture
def compiled(seen):
    found = with_compiled_passes(split_classifier(TinyCNN().eval()))
    seen.clear()
    return found


def test_all_else_runs_as_it_was_written(compiled, seen):
    like = compiled.probe()
    with torch.no_grad():
        compiled(like)
        compiled.embed(like[:1])
        compiled.embed(like[..., :16, :16])
        copy.deepcopy(compiled).embed(like)
    compiled.embed(like)  # with gradients
    compiled.backbone.model.train()
    with torch.no_grad():
        compiled.embed(like)
    assert seen == []


@torch.no_grad()
def test_other_heads_and_maps_keep_the_compiled_passes(compiled, seen):
    like = compiled.probe()
    compiled.with_head(torch.randn(3, compiled.embedding_dim)).embed(like)
    compiled.reading(("stages.0",)).embed(like)
    assert seen == [tuple(like.shape)] * 2


@torch.no_grad()
def test_weights_are_read_where_they_are(compiled):
    like = compiled.probe()
    before = compiled.embed(like)
    for weight in compiled.backbone.model.parameters():
        weight.mul_(1.5)
    found = compiled.embed(like)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, compiled(like).embeddings)


def test_a_copy_has_weights_of_its_own(compiled):
    other = copy.deepcopy(compiled)
    assert not isinstance(other.backbone, CompiledBackbone)
    with torch.no_grad():
        for weight in other.backbone.model.parameters():
            weight.zero_()
        assert not torch.equal(other.embed(other.probe()), compiled.embed(compiled.probe()))


@torch.no_grad()
def test_compiled_passes_are_counted(compiled):
    like = compiled.probe()
    with counting(compiled.backbone) as cost:
        compiled.embed(like)
        compiled.embed(like[:1])
        compiled(like)
    assert cost.forward == 2 * len(like) + 1
    assert not compiled.backbone.compiled_pass._forward_pre_hooks


class DependsOnValues(TinyCNN):
    def forward(self, pixel_values):
        return super().forward(pixel_values if pixel_values.sum() > 0 else -pixel_values)


def test_what_cannot_be_traced_is_refused_in_one_sentence():
    classifier = split_classifier(DependsOnValues().eval())
    with pytest.raises(ValueError, match=r"^DependsOnValues cannot be compiled \(.*\); leave torch_compile out\.$"):
        with_compiled_passes(classifier)


def test_other_embeddings_are_refused(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda pixel_values: function(pixel_values) + 1)
    with pytest.raises(ValueError, match=r"compiled embeddings of .* differ by .*; leave torch_compile out"):
        with_compiled_passes(split_classifier(TinyCNN().eval()))


@pytest.mark.slow
@torch.no_grad()
def test_the_default_compiler(images):
    plain = split_classifier(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(7200, 3)).eval())
    classifier = with_compiled_passes(plain)
    for batch in (2, 5, 3):
        torch.testing.assert_close(classifier.embed(images(batch, 32)), plain.embed(images(batch, 32)))
