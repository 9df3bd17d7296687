"""A short run on a parquet file of noise: its settings, and what it ends with if nothing happens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from accelerate.state import AcceleratorState
from tiny import RUN, noise_image, save_classifier

from tve_hf.pretrain import PretrainArguments, pretrain

NUM_IMAGES = 7


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="session")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "noise.parquet"
    features = datasets.Features({"image": datasets.Image(), "name": datasets.Value("string")})
    rows = {"image": [noise_image(seed) for seed in range(NUM_IMAGES)], "name": ["x"] * NUM_IMAGES}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.fixture
def settings(classifier: Path, parquet: Path, tmp_path: Path, isolated: None) -> dict[str, Any]:
    """Six steps, with a checkpoint after every other, in `tmp_path / "run"`."""
    files = {"classifier": str(classifier), "train_files": [str(parquet)]}
    return files | {"output_dir": str(tmp_path / "run")} | RUN


@pytest.fixture(scope="session")
def whole(classifier: Path, parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, bytes]:
    """Settings of a run but for its folder, and the weights and the file of weights that it ends with."""
    folder = tmp_path_factory.mktemp("whole")
    settings = {"classifier": str(classifier), "train_files": [str(parquet)]} | RUN | {"learning_rate": 1e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        AcceleratorState._reset_state(True)
        trained = pretrain(PretrainArguments(**settings, output_dir=str(folder / "run")))
        AcceleratorState._reset_state(True)
    return settings, trained.state_dict(), (folder / "run" / "model.safetensors").read_bytes()


@pytest.fixture
def broken_parquet(tmp_path: Path) -> Path:
    """Eight images, of which number 2 is none."""
    rows = [datasets.Image().encode_example(noise_image(seed)) for seed in range(8)]
    rows[2] = {"bytes": b"no image", "path": "holiday.jpg"}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(tmp_path / "broken.parquet")
    return tmp_path / "broken.parquet"


@pytest.fixture
def streamed(tmp_path: Path) -> Callable[[Path], dict[str, Any]]:
    """Settings to stream a file's images from a folder of `save_to_disk`: one of parquet sleeps 5 s at its end."""

    def save(parquet: Path) -> dict[str, Any]:
        datasets.Dataset.from_parquet(str(parquet)).save_to_disk(tmp_path / "saved")
        return {"train_files": [], "dataset_name": str(tmp_path / "saved"), "streaming": True}

    return save
