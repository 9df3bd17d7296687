"""Fingerprints tell weights apart, and nothing else."""

import hashlib
import re
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tve_hf.classifiers import split_classifier
from tve_hf.fingerprint import fingerprint, match

OTHER_WEIGHTS = "same architecture, other weights"


def _of(model: nn.Module) -> str:
    return split_classifier(model).fingerprint()


def test_it_is_a_short_string_that_does_not_depend_on_the_run(build) -> None:
    one = _of(build("vit"))
    assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{64}", one)
    assert one == _of(build("vit"))


def test_value_worked_out_by_hand() -> None:
    tensors = [torch.arange(1, 7).float().view(2, 3), torch.tensor([3, 4])]
    shapes, _, sketch = fingerprint(tensors).partition("-")
    assert shapes == hashlib.sha256(b"[(2, 3)]").hexdigest()[:12]
    # sqrt(91 / 6) is the root mean square of 1..6; a leading 0 stands before all tensors, so 7 values in all.
    values = torch.frombuffer(bytearray.fromhex(sketch), dtype=torch.float16).double()
    steps = values * 7**0.5 * (91 / 6) ** 0.5  # sums of +-1 +-2 ... +-6: odd integers from -21 to 21
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=0.02)
    assert ((steps.round().abs() % 2 == 1) & (steps.abs() < 21.5)).all()
    assert len(set(steps.round().tolist())) > 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_does_not_matter(build, architecture, dtype) -> None:
    model = build(architecture)
    before = _of(model)
    assert match(before, fingerprint(t.to(dtype) for t in _backbone_tensors(model))) == "same weights"


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


@pytest.mark.parametrize("name", ["vit", "mobilenet_v2"])
def test_the_head_does_not_matter(build, name) -> None:
    model = build(name)
    before = _of(model)
    model.classifier = nn.Linear(model.classifier.in_features, 9).eval()
    assert _of(model) == before


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
