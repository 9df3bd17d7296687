"""Tiny models with random weights that leave no architecture insensitive to its pixels, and the shared real ones."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_ops as torchvision_ops  # before transformers, which imports torchvision where there is one
from hub_server import Hub
from stranger import link_packages
from tiny import save_noise, save_pair
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

NUM_LABELS = 5
_VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2], "window_size": 2}


@dataclass(frozen=True)
class Spec:
    """How to build a tiny classifier, and what splitting it must find."""

    model_class: type[nn.Module]
    config: Any
    side: int  # pixels
    embedding_dim: int
    feature_shapes: list[tuple[int, int, int]]  # (C, h, w) of each map, at that side


def _spec(
    model_class: type[nn.Module], config_class: type, side: int, dim: int, shapes: list[tuple], **values: Any
) -> Spec:
    return Spec(model_class, config_class(num_labels=NUM_LABELS, **values), side, dim, shapes)


def _specs() -> dict[str, Spec]:
    tokens = [(32, 4, 4)] * 3
    mlp = {"intermediate_size": 64}
    dino = _VIT | {"mlp_ratio": 2}
    stages = [(16, 8, 8), (24, 4, 4), (32, 2, 2)]
    return {
        "vit": _spec(ViTForImageClassification, ViTConfig, 32, 32, tokens, **_VIT, **mlp),
        "deit": _spec(DeiTForImageClassification, DeiTConfig, 32, 32, tokens, **_VIT, **mlp),
        "beit": _spec(BeitForImageClassification, BeitConfig, 32, 32, tokens, **_VIT, **mlp),
        "dinov2": _spec(Dinov2ForImageClassification, Dinov2Config, 32, 64, tokens, **dino),
        "dinov2_with_registers": _spec(
            Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig, 32, 64, tokens, **dino
        ),
        "swin": _spec(
            SwinForImageClassification,
            SwinConfig,
            64,
            128,
            [(64, 4, 4), (128, 2, 2), (128, 2, 2)],
            image_size=64,
            **_SWIN,
        ),
        "convnext": _spec(ConvNextForImageClassification, ConvNextConfig, 64, 32, stages, image_size=64, **_STAGES),
        "resnet": _spec(ResNetForImageClassification, ResNetConfig, 64, 32, stages, embedding_size=8, **_STAGES),
        "mobilenet_v1": _spec(
            MobileNetV1ForImageClassification,
            MobileNetV1Config,
            64,
            128,
            [(32, 8, 8), (64, 4, 4), (128, 2, 2)],
            image_size=64,
            depth_multiplier=0.125,
        ),
        "mobilenet_v2": _spec(
            MobileNetV2ForImageClassification,
            MobileNetV2Config,
            64,
            1280,
            [(8, 4, 4), (16, 4, 4), (40, 2, 2)],
            image_size=64,
            depth_multiplier=0.125,
        ),
    }


SPECS = _specs()


class TinyCNN(nn.Module):
    """A plain module that returns a tensor: three stages of convolution and ReLU, mean over the map, linear."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        sides = [channels, 4, 6, 8]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(sides[i], sides[i + 1], 3, stride=2, padding=1), nn.ReLU()) for i in range(3)
        )
        self.fc = nn.Linear(8, NUM_LABELS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        for stage in self.stages:
            pixel_values = stage(pixel_values)
        return self.fc(pixel_values.mean((2, 3)))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights that carry the signal through, unlike the tiny initial ones, and batch statistics that fit them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return std * torch.randn(like.shape, generator=generator)

    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            is_table = "token" in name or "position" in name
            weight.copy_(normal(weight, 0.5 if is_table else 1.3 / weight[0].numel() ** 0.5))
        elif "bias" in name:
            weight.copy_(normal(weight, 0.1))
        else:
            weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
    return model


@torch.no_grad()
def fit_batch_statistics(model: nn.Module, side: int) -> nn.Module:
    """Give batch normalisation the statistics of noise images, without which it lets tiny signals fade."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.random.fork_rng():
            torch.manual_seed(0)  # for dropout
            model.train()(torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()


@pytest.fixture(scope="session")
def shared_model() -> Callable[[str], nn.Module]:
    """Builder of tiny models by name, built once; not to be changed by a test: those take `build`."""
    built: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in built:
            if name == "cnn":
                built[name] = randomize(TinyCNN()).eval()
            else:
                spec = SPECS[name]
                model = randomize(spec.model_class(copy.deepcopy(spec.config)))
                built[name] = fit_batch_statistics(model, spec.side)
        return built[name]

    return get


@pytest.fixture
def build(shared_model: Callable[[str], nn.Module]) -> Callable[[str], nn.Module]:
    """Builder of tiny models by name, a copy for each call."""
    return lambda name: copy.deepcopy(shared_model(name))


@pytest.fixture(params=sorted(SPECS))
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of each tiny architecture in turn."""
    return request.param


@pytest.fixture(scope="session")
def specs() -> dict[str, Spec]:
    return SPECS


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """Noise images: images(batch, height, width=height, channels=3, seed=0)."""

    def draw(batch: int, height: int, width: int | None = None, channels: int = 3, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, channels, height, width or height, generator=generator)

    return draw


@pytest.fixture(scope="session")
def randomized() -> Callable[..., nn.Module]:
    """`randomize`, for modules that a test builds itself."""
    return randomize


@pytest.fixture(scope="session")
def fitted() -> Callable[[nn.Module, int], nn.Module]:
    """`randomize` and `fit_batch_statistics`, in eval mode: fitted(model, side)."""
    return lambda model, side: fit_batch_statistics(randomize(model), side)


@pytest.fixture(scope="session")
def processor_of() -> Callable[..., Any]:
    """A stand-in for an image processor, which tells `split_classifier` the shape (C, H, W) of its probe."""

    def make(*shape: int) -> Callable[..., dict[str, Tensor]]:
        return lambda image, return_tensors: {"pixel_values": torch.zeros(1, *shape)}

    return make


def _shared(name: str) -> Path:
    """A folder of real data next to the repository; tests that read it are skipped where it is not."""
    path = Path(__file__).resolve().parents[2] / "shared" / name
    if not path.is_dir():
        pytest.skip(f"needs ../shared/{name}")
    return path


@pytest.fixture(scope="session")
def shared_models_dir() -> Path:
    """Folder of real pretrained classifiers."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real image sets."""
    return _shared("data")


class Waits:
    """A clock for the Hub's client, whose waits take no time but are written down."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waited.append(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub of this test's own, to which the real client talks, with an empty cache in `hub.cache`.

    The client reads HF_ENDPOINT and the like when it is imported; this sets what it has read.
    """
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http
    from transformers.utils import hub as transformers_hub

    with Hub() as server:
        server.waits = Waits()
        server.cache = tmp_path / "hub-cache"
        settings = {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(server.cache),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # tests/test_xet.py allows it
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", server.waits)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield server


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny classifier and its explainer, not to be changed."""
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def online(hub: Hub, pair: tuple[Path, Path]) -> Hub:
    """That Hub, with the tiny classifier as org/vit and the explainer as org/tve."""
    for name, folder in zip(("org/vit", "org/tve"), pair, strict=True):
        hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})
    return hub


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing of Accelerate's state from test to test, and a cache of `datasets` of this test's own."""
    datasets = pytest.importorskip("datasets")
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with transformers, torch, pillow and what they require, and without this package."""
    return link_packages(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What `evaluate` writes for the shipped explainer on two tasks of two noise images each, one folder for each."""
    import datasets

    from tve_hf.benchmark.run import EvaluateArguments, evaluate
    from tve_hf.released import CHECKPOINTS, DEFAULT_CLASSIFIER, DEFAULT_EXPLAINER

    folder = tmp_path_factory.mktemp("reports")
    tasks = {"tiny_imagenet": DEFAULT_CLASSIFIER, "cats_vs_dogs": CHECKPOINTS / "vit-tiny-cats-vs-dogs"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        noise = save_noise(folder / "noise.parquet", 2, label=[0, 1])
        for task, classifier in tasks.items():
            arguments = EvaluateArguments(
                classifier=str(classifier),
                model=str(DEFAULT_EXPLAINER),
                test_files=[str(noise)],
                output_dir=str(folder / task),
                methods=["random"],
                removals=["zero", "blur"],
                num_gallery=0,
            )
            evaluate(arguments)
    return [folder / task for task in tasks]
