"""Fingerprints tell weights apart, and nothing else."""

import hashlib
import re
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTForImageClassification

from tve_hf.classifiers import split_classifier
from tve_hf.fingerprint import fingerprint, match

OTHER_WEIGHTS = "same architecture, other weights"


def _of(model: nn.Module, full: bool = False) -> str:
    return split_classifier(model).fingerprint(full)


def test_it_is_a_short_string_that_does_not_depend_on_the_run(build) -> None:
    one = _of(build("vit"))
    assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{64}-[0-9a-f]{64}", one)
    assert one == _of(build("vit"))
    assert re.fullmatch(r"[0-9a-f]{12}-full-[0-9a-f]{64}", _of(build("vit"), full=True))


def test_value_worked_out_by_hand() -> None:
    tensors = [torch.arange(1, 7).float().view(2, 3), torch.tensor([3, 4])]
    shapes, sketch, hashes = fingerprint(tensors).split("-")
    assert shapes == hashlib.sha256(b"[(2, 3)]").hexdigest()[:12]
    # sqrt(91 / 6) is the root mean square of 1..6; a leading 0 stands before all tensors, so 7 values in all.
    values = torch.frombuffer(bytearray.fromhex(sketch), dtype=torch.float16).double()
    steps = values * 7**0.5 * (91 / 6) ** 0.5  # sums of +-1 +-2 ... +-6: odd integers from -21 to 21
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=0.02)
    assert ((steps.round().abs() % 2 == 1) & (steps.abs() < 21.5)).all()
    assert len(set(steps.round().tolist())) > 4
    assert hashes == 4 * hashlib.sha256(struct.pack("<6f", 1, 2, 3, 4, 5, 6)).hexdigest()[:16]  # nothing to round


def test_hashes_worked_out_by_hand() -> None:
    values = np.array([1.0009765, -0.3, 3.1415927, -0.0, 1e-9, 0.0], np.float32)

    def bfloat16(x: np.ndarray) -> np.ndarray:  # to nearest, ties to even
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)

    half = values.astype(np.float16).astype(np.float32)
    versions = [values, bfloat16(values), half, bfloat16(half)]
    assert len({version.tobytes() for version in versions}) == 4
    expected = "".join(hashlib.sha256((version + np.float32(0)).tobytes()).hexdigest()[:16] for version in versions)
    found = fingerprint([torch.from_numpy(values).view(2, 3)], full=True)
    assert found.split("-")[1:] == ["full", expected]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_does_not_matter(build, architecture, dtype, full) -> None:
    model = build(architecture)
    before = _of(model, full)
    rounded = [t.to(dtype) for t in _backbone_tensors(model)]
    assert match(before, fingerprint(rounded, full)) == "same weights"
    assert match(before, fingerprint((t.float() for t in rounded), full)) == "same weights"
    if dtype == torch.float16:  # a checkpoint in float16, loaded in bfloat16
        assert match(fingerprint((t.bfloat16() for t in rounded), full), before) == "same weights"


@pytest.mark.parametrize("full", [False, True])
def test_saving_in_shards_does_not_matter(build, tmp_path, full) -> None:
    model = build("vit")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    before = _of(build("vit"), full)
    assert split_classifier(ViTForImageClassification.from_pretrained(tmp_path / "shards")).fingerprint(full) == before
    for dtype in (torch.bfloat16, torch.float32):
        half = ViTForImageClassification.from_pretrained(tmp_path / "half", dtype=dtype)
        assert match(split_classifier(half).fingerprint(full), before) == "same weights"


def _backbone_tensors(model: nn.Module) -> list[torch.Tensor]:
    """The state without the head, which in every tiny architecture is called classifier."""
    return [t for name, t in model.state_dict().items() if not name.startswith("classifier") and t.is_floating_point()]


def test_names_do_not_matter(build) -> None:
    class Renamed(nn.Module):
        def __init__(self, cnn: nn.Module) -> None:
            super().__init__()
            self.body = nn.Sequential(OrderedDict(zip(["first", "then", "last"], cnn.stages, strict=True)))
            self.output = cnn.fc

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.output(self.body(pixel_values).mean((2, 3)))

    model = build("cnn")
    assert match(_of(model), _of(Renamed(model).eval())) == "same weights"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["vit", "mobilenet_v2"])
def test_the_head_does_not_matter(build, name, full) -> None:
    model = build(name)
    before = _of(model, full)
    model.classifier = nn.Linear(model.classifier.in_features, 9).eval()
    assert _of(model, full) == before
    classifier = split_classifier(model)
    assert classifier.with_head(lambda embeddings: embeddings[..., :3]).fingerprint(full) == before


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "resnet", "mobilenet_v2"])
def test_a_little_fine_tuning_matters(build, images, specs, name) -> None:
    model = build(name)
    before = _of(model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for step in range(5):
        loss = F.cross_entropy(model(images(8, specs[name].side, seed=step)).logits, torch.arange(8) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert match(before, _of(model.eval())) == OTHER_WEIGHTS


def test_a_step_of_the_papers_fine_tuning_matters(build, images) -> None:
    model = build("vit")
    before = _of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, weight_decay=0.05)
    for step in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(images(4, 32, seed=step)).logits, torch.arange(4)).backward()
        optimizer.step()
    assert match(before, _of(model)) == OTHER_WEIGHTS


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("name", ["vit", "swin", "mobilenet_v2"])
def test_one_small_step_matters(build, images, specs, name, optimizer_class) -> None:
    model = build(name)
    before = _of(model), _of(model, full=True)
    optimizer = optimizer_class(model.parameters(), lr=1e-4)
    F.cross_entropy(model(images(4, specs[name].side)).logits, torch.arange(4)).backward()
    optimizer.step()
    assert match(before[0], _of(model)) == OTHER_WEIGHTS
    assert match(before[1], _of(model, full=True)) == OTHER_WEIGHTS


def _merge_adapter(model: nn.Module) -> None:
    """Merge a low-rank adapter into one layer."""
    weight = model.vit.layers[1].attention.q_proj.weight
    weight.add_(1e-3 * torch.outer(torch.ones(len(weight)), weight[0]))


def _shift_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.add_(1e-3)


def _change_one_tensor(model: nn.Module) -> None:
    model.vit.layers[2].mlp.fc2.weight.mul_(1.01)


def _change_one_value(model: nn.Module) -> None:
    model.vit.layers[0].mlp.fc1.weight.view(-1)[1] *= 1.01  # 2048 values, of which every eighth is sampled


@pytest.mark.parametrize("change", [_merge_adapter, _shift_biases, _change_one_tensor, _change_one_value])
@torch.no_grad()
def test_a_full_fingerprint_sees_every_change(build, change) -> None:
    model = build("vit")
    before, quick = _of(model, full=True), _of(model)
    change(model)
    assert match(before, _of(model, full=True)) == OTHER_WEIGHTS
    assert match(before, _of(model.bfloat16(), full=True)) == OTHER_WEIGHTS  # beyond its rounding
    seen = match(quick, _of(model.float())) == OTHER_WEIGHTS
    assert seen == (change is not _change_one_value)  # what a sample cannot promise


def test_kinds_do_not_mix(build) -> None:
    with pytest.raises(ValueError, match="quick and a full fingerprint cannot be compared; make both with the same"):
        match(_of(build("vit")), _of(build("vit"), full=True))


def test_what_is_no_fingerprint_is_refused() -> None:
    fingerprints = [fingerprint([torch.ones(3)]), "abc-def"]
    for one, other in (fingerprints, fingerprints[::-1]):
        with pytest.raises(ValueError, match="'abc-def' is no fingerprint; make one with `classifier.fingerprint"):
            match(one, other)


class Tied(nn.Module):
    """A backbone that uses one weight twice, and whose head may share it too."""

    def __init__(self, tied: bool, head: int | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.once, self.twice = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, head or 6)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.twice.weight.copy_(self.once.weight)
        if tied:
            self.twice.weight = self.once.weight
        if head is None:
            self.head.weight = self.once.weight

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixel_values).mean((2, 3))
        return self.head(self.twice(self.once(x).relu()).relu())


@pytest.mark.parametrize("full", [False, True])
def test_sharing_does_not_matter(processor_of, full) -> None:
    models = [Tied(tied=True), Tied(tied=False), Tied(tied=True, head=4)]
    one, *others = (split_classifier(m.eval(), processor_of(3, 16, 16)).fingerprint(full) for m in models)
    assert all(match(one, other) == "same weights" for other in others)


def test_a_head_under_two_names_is_left_out_under_both(processor_of) -> None:
    model = Tied(tied=True, head=4).eval()
    before = split_classifier(model, processor_of(3, 16, 16)).fingerprint()
    model.alias = model.head
    assert split_classifier(model, processor_of(3, 16, 16)).fingerprint() == before


@pytest.mark.parametrize("full", [False, True])
@torch.no_grad()
def test_batch_statistics_matter_but_their_counter_does_not(build, full) -> None:
    model = build("mobilenet_v2")
    before = _of(model, full)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.num_batches_tracked += 1
    assert _of(model, full) == before
    norm.running_mean.add_(0.01)
    assert match(before, _of(model, full)) == OTHER_WEIGHTS


def test_other_random_weights_are_noticed(build, randomized) -> None:
    assert match(_of(build("vit")), _of(randomized(build("vit"), seed=1))) == OTHER_WEIGHTS


def test_another_architecture_is_no_match(build, specs) -> None:
    fingerprints = [_of(build(name)) for name in [*specs, "cnn"] if name not in ("vit", "deit", "beit")]
    for i, one in enumerate(fingerprints):
        for other in fingerprints[i + 1 :]:
            assert match(one, other) == "no"
    assert match(_of(build("vit")), _of(build("deit"))) == "no"


def test_one_row_more_is_another_architecture() -> None:
    assert match(fingerprint([torch.ones(4, 3)]), fingerprint([torch.ones(5, 3)])) == "no"
    assert match(fingerprint([torch.ones(4, 3)]), fingerprint([torch.ones(3, 4)])) == "no"


def test_integers_and_empty_states_are_no_trouble() -> None:
    assert fingerprint([torch.ones(3), torch.tensor(7)]) == fingerprint([torch.ones(3), torch.tensor(8)])
    assert match(fingerprint([]), fingerprint([])) == "same weights"


def test_real_classifiers_of_one_architecture_and_two_data_sets(shared_models_dir) -> None:
    imagenet, birds, other = (
        split_classifier(shared_models_dir / name).fingerprint()
        for name in (
            "mobilenet_v2_1.0_224_imagenet",
            "mobilenet_v2_1.0_224_inat_bird",
            "mobilenet_v1_0.25_128_imagenet",
        )
    )
    assert match(imagenet, birds) == OTHER_WEIGHTS
    assert match(imagenet, other) == "no"
    half = split_classifier(shared_models_dir / "mobilenet_v2_1.0_224_imagenet", dtype=torch.bfloat16)
    assert match(imagenet, half.fingerprint()) == "same weights"
