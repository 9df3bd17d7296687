"""Check what comes down before a model is built from it: safetensors only, whole, and as its config says."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError, safe_open

from .hub_errors import asking_hub

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FETCH_AGAIN = "fetch it again, from the Hub with force_download=True"
# Settings in config.json that make transformers build or load something else than the files say.
_DIVERTING = ("quantization_config", "transformers_weights", "fusion_config")


@dataclass(frozen=True)
class Source:
    """A folder or a repository of the Hub at one commit, and how to read from it."""

    name: str
    subfolder: str = ""
    hub: dict[str, Any] = field(default_factory=dict)  # arguments of hf_hub_download; empty for a folder

    def file(self, filename: str) -> Path | None:
        """Fetch a file, or None if there is none.

        Raises:
            OSError: If it cannot be fetched.
        """
        filename = f"{self.subfolder}/{filename}" if self.subfolder else filename
        hub = self.hub
        if not hub:
            path = Path(self.name, filename)
            return path if path.is_file() else None
        # A commit never changes: what the cache knows of it, also that a file does not exist, is right.
        cached = try_to_load_from_cache(self.name, filename, cache_dir=hub["cache_dir"], revision=hub["revision"])
        if cached is not None and not hub["force_download"]:
            return Path(cached) if isinstance(cached, str) else None
        with asking_hub(self.name):
            try:
                return Path(hf_hub_download(self.name, filename, **hub))
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) and not hub["local_files_only"]:
                    raise
                return None

    @property
    def pinned(self) -> dict[str, Any]:
        """Arguments that make `from_pretrained` read what was read here."""
        return {key: self.hub[key] for key in ("revision", "local_files_only") if self.hub}


def open_source(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
) -> Source:
    """Settle where files come from: a folder as it is, a repository at the commit that its revision names now.

    Where the Hub cannot be reached, the cache serves; where that has nothing either, one try of some seconds is all,
    while transformers would repeat it for half a minute for each of several files.

    Raises:
        OSError: If there is no such folder, repository or revision, no access, or no connection.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        return Source(name, subfolder)
    hub = {"token": token, "cache_dir": cache_dir, "revision": revision, "force_download": force_download}
    config = f"{subfolder}/{CONFIG}" if subfolder else CONFIG
    with asking_hub(name, revision):
        local_files_only = local_files_only or is_offline_mode() or not _in_reach(name, config, hub)
        path = Path(hf_hub_download(name, config, **hub, local_files_only=local_files_only))
    hub["revision"] = path.parents[len(Path(config).parts) - 1].name  # snapshots/<commit>/config.json
    return Source(name, subfolder, hub | {"local_files_only": local_files_only})


def _in_reach(name: str, filename: str, hub: dict[str, Any]) -> bool:
    """Ask the Hub for a file once; False where it cannot be reached, but the cache has the file."""
    url = hf_hub_url(name, filename, revision=hub["revision"])
    try:
        get_hf_file_metadata(url, token=hub["token"], timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError as error:
        # Where the Hub is busy or down, hf_hub_download waits as long as it says, or takes the cached file.
        if error.response.status_code not in (408, 429) and error.response.status_code < 500:
            raise
    except httpx.RequestError:
        cached = try_to_load_from_cache(name, filename, hub["cache_dir"], hub["revision"])
        if hub["force_download"] or not isinstance(cached, str):
            raise
        return False
    return True


def find_weights(source: Source, variant: str | None = None) -> list[Path]:
    """Fetch the safetensors files of a model: one, or the shards that its index names.

    Raises:
        OSError: If there are none, or one is missing.
        ValueError: If the index names anything else than files beside it, or of a folder beside that of `source`, or a
            file is damaged.
    """

    def named(filename: str) -> str:
        stem, _, end = filename.rpartition(".")
        return f"{stem}.{variant}.{end}" if variant else filename

    single = source.file(named(WEIGHTS))
    if single is not None:
        _check_header(single)
        return [single]
    index = source.file(named(INDEX))
    if index is None:
        raise OSError(
            f"{source.name} has no {named(WEIGHTS)}; other formats, such as pickles, can run code and are not loaded: "
            "ask for it in safetensors."
        )
    content = _read_dict(index, source.name)
    if not (isinstance(content.get("weight_map"), dict) and isinstance(content.get("metadata"), dict)):
        raise ValueError(f"{index.name} of {source.name} is damaged (it names no files); {_FETCH_AGAIN}.")
    files = []
    for shard in sorted(set(map(str, content["weight_map"].values()))):
        # Folders on disk may share a file, as classifiers of one backbone do; a repository has nothing beside it.
        beside = "" if source.hub else r"(\.\./[\w-][\w.-]*/)?"
        if not re.fullmatch(beside + r"[\w-][\w.-]*\.safetensors", shard):
            raise ValueError(
                f"{index.name} of {source.name} names {shard!r}, which is no safetensors file beside it; "
                "do not trust this checkpoint."
            )
        file = source.file(shard)
        if file is None:
            raise OSError(f"{source.name} lacks {shard}, which its {index.name} names; {_FETCH_AGAIN}.")
        _check_header(file)
        files.append(file)
    return files


def _check_header(file: Path) -> None:
    """Refuse a file that is no safetensors, or not as long as its header says."""
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{file} cannot be loaded ({error}): it is damaged or no safetensors file; {_FETCH_AGAIN}."
        ) from error


def checked(model_class: Any, name: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Check a checkpoint before `model_class.from_pretrained` loads it, and return the arguments to load it with.

    Args:
        model_class: class of the model, with its `config_class`.
        name: folder or repository.
        kwargs: arguments of `from_pretrained`.

    Raises:
        OSError: If files are missing or out of reach.
        ValueError: If it is another kind of model, in another format, or damaged.
    """
    if kwargs.get("use_safetensors") is False or kwargs.get("gguf_file"):
        raise ValueError("use_safetensors=False and gguf_file are not for explainers, which are safetensors only.")
    ways = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
    source = open_source(name, **{way: kwargs[way] for way in ways if way in kwargs})
    _check_config(source, model_class.config_class.model_type)
    find_weights(source, kwargs.get("variant"))
    # What is forced down again has just come.
    return kwargs | source.pinned | {"use_safetensors": True, "force_download": False}


def read_config(source: Source) -> dict[str, Any]:
    """Read the config.json of a model.

    Raises:
        OSError: If there is none.
        ValueError: If it is damaged.
    """
    path = source.file(CONFIG)
    if path is None:
        raise OSError(f"{source.name} has no {CONFIG}; pass the folder or repository of an explainer.")
    return _read_dict(path, source.name)


def _read_dict(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} of {name} is damaged ({error}); {_FETCH_AGAIN}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} of {name} is damaged (it is no JSON object); {_FETCH_AGAIN}.")
    return content


def _check_config(source: Source, model_type: str) -> None:
    """Refuse a config.json of another kind of model, or one that diverts what is built or loaded."""
    stored = read_config(source)
    kind = stored.get("model_type")
    if kind != model_type:
        raise ValueError(f"{source.name} is no explainer, but a {kind!r}; pass the name of an explainer.")
    diverting = [key for key in _DIVERTING if stored.get(key)]
    if diverting:
        raise ValueError(f"{CONFIG} of {source.name} sets {diverting[0]}, which explainers do not have; remove it.")
    if source.file("adapter_config.json") is not None:
        raise ValueError(f"{source.name} holds an adapter; load the explainer it is for, then call load_adapter.")


def check_report(name: str, report: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not those that its config describes.

    Args:
        name: folder or repository.
        report: what transformers says of the loading, the `output_loading_info` of `from_pretrained`.

    Raises:
        ValueError: Naming the first weight that differs.
    """

    def sides(shape: Iterable[int]) -> str:
        return " x ".join(map(str, shape))

    differing = {key: (sides(described), sides(held)) for key, held, described in report["mismatched_keys"]}
    differing |= {key: ("it", "nothing") for key in report["missing_keys"]}
    differing |= {key: ("nothing", "it") for key in report["unexpected_keys"]}
    if differing:
        key, *others = sorted(differing)
        described, held = differing[key]
        raise ValueError(
            f"{name} contradicts itself: for {key}{f' and {len(others)} others' if others else ''} {CONFIG} describes "
            f"{described}, but the weights hold {held}; {_FETCH_AGAIN}, or pass ignore_mismatched_sizes=True to start "
            "what does not fit afresh."
        )


__all__ = ["check_report", "checked", "find_weights", "open_source", "read_config"]
