"""Fixtures: tiny models, the shared real ones, a Hub, and folders and reports that several tests read."""

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_ops as torchvision_ops  # before transformers, which imports torchvision where there is one
from hub_server import Hub
from stranger import link_packages
from tiny import save_noise, save_pair
from tiny_models import SPECS, Spec, TinyCNN, fit_batch_statistics, randomize
from torch import Tensor, nn

# A fork has none of the threads that torch would wait for; and results are the same to the bit.
torch.set_num_threads(1)


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
    from shipped import VIT, VIT_EXPLAINER, VIT_PETS

    from tve_hf.benchmark.run import EvaluateArguments, evaluate

    folder = tmp_path_factory.mktemp("reports")
    tasks = {"tiny_imagenet": VIT, "cats_vs_dogs": VIT_PETS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        noise = save_noise(folder / "noise.parquet", 2, label=[0, 1])
        for task, classifier in tasks.items():
            arguments = EvaluateArguments(
                classifier=str(classifier),
                model=str(VIT_EXPLAINER),
                test_files=[str(noise)],
                output_dir=str(folder / task),
                methods=["exact", "random"],
                removals=["zero", "blur"],
                num_gallery=0,
            )
            evaluate(arguments)
    return [folder / task for task in tasks]
