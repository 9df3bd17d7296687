"""Check what comes down before a model is built from it: safetensors only, whole, and as its config says."""

import copy
import errno
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BAD_TOKEN = "The token is not valid; log in again with `hf auth login`, or set HF_TOKEN to another."
# Settings in config.json that make transformers build or load something else than the files say.
_DIVERTING = ("quantization_config", "transformers_weights", "fusion_config")


@dataclass(frozen=True)
class Source:
    """A folder or a repository of the Hub at one commit, and how to read from it."""

    name: str
    subfolder: str = ""
    hub: dict[str, Any] = field(default_factory=dict)  # arguments of hf_hub_download; empty for a folder

    def file(self, filename: str) -> Path | None:
        """Fetch a file, or None if there is none."""
        return self._fetched(filename) if self.hub else self._found(filename)

    def _found(self, filename: str) -> Path | None:
        root = Path(self.name).resolve()
        path = root / self.subfolder / filename
        if not path.is_file():
            return None
        # A snapshot in the Hub's cache consists of links to the cache's own files: those of its repository or, of
        # what came by Xet, those that all repositories share.
        homes = [root, Path(constants.HF_HUB_CACHE).resolve()]
        homes += [above / "blobs" for above in root.parents[1:3] if root.parent.name == "snapshots"]
        if not any(path.resolve().is_relative_to(home) for home in homes):
            raise ValueError(
                f"{Path(self.name, self.subfolder, filename)} is a link that leads out of its folder; "
                "put the file itself there."
            )
        return path

    def _fetched(self, filename: str) -> Path | None:
        hub = self.hub
        # A commit never changes: what the cache knows of it, also that a file does not exist, is right.
        known = try_to_load_from_cache(
            self.name, self._path(filename), cache_dir=hub["cache_dir"], revision=hub["revision"]
        )
        if known is not None and not hub["force_download"]:
            return _whole(self.name, Path(known)) if isinstance(known, str) else None
        try:
            path = Path(hf_hub_download(self.name, self._path(filename), **hub))
        except Exception as error:
            if isinstance(error, EntryNotFoundError) and (
                hub["local_files_only"] or not isinstance(error, LocalEntryNotFoundError)
            ):
                return None
            raise hub_error(error, self.name) from error
        return _whole(self.name, path)

    @property
    def pinned(self) -> dict[str, Any]:
        """Arguments that make `from_pretrained` read what was read here."""
        return {key: self.hub[key] for key in ("revision", "local_files_only") if self.hub}

    def _path(self, filename: str) -> str:
        return f"{self.subfolder}/{filename}" if self.subfolder else filename


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
    hub = {"token": token, "cache_dir": cache_dir, "revision": revision}
    local_files_only = local_files_only or is_offline_mode()
    config = f"{subfolder}/{CONFIG}" if subfolder else CONFIG
    try:
        if not local_files_only:
            try:
                get_hf_file_metadata(
                    hf_hub_url(name, config, revision=revision), token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT
                )
            except HfHubHTTPError as error:
                # Where the Hub is busy or down, hf_hub_download waits as long as it says, or takes the cached file.
                if error.response.status_code not in (408, 429) and error.response.status_code < 500:
                    raise
            except Exception:
                if not isinstance(try_to_load_from_cache(name, config, cache_dir, revision), str):
                    raise
                local_files_only = True
        path = Path(
            hf_hub_download(name, config, **hub, local_files_only=local_files_only, force_download=force_download)
        )
    except Exception as error:
        raise hub_error(error, name, revision) from error
    hub["revision"] = _whole(name, path).parents[len(Path(config).parts) - 1].name  # snapshots/<commit>/config.json
    return Source(name, subfolder, hub | {"local_files_only": local_files_only, "force_download": force_download})


def find_weights(source: Source, variant: str | None = None) -> list[Path]:
    """Fetch the safetensors files of a model: one, or the shards that its index names.

    Raises:
        OSError: If there are none, or one is missing.
        ValueError: If the index names anything else than files beside it.
    """

    def named(filename: str) -> str:
        stem, _, end = filename.rpartition(".")
        return f"{stem}.{variant}.{end}" if variant else filename

    single = source.file(named(WEIGHTS))
    if single is not None:
        return [single]
    index = source.file(named(INDEX))
    if index is None:
        raise OSError(
            f"{source.name} has no {named(WEIGHTS)}; other formats, such as pickles, can run code and are not loaded: "
            "ask for it in safetensors."
        )
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"], shards = dict(content["metadata"]), sorted(set(content["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} of {source.name} is damaged; fetch it again.") from error
    files = []
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise ValueError(
                f"{index.name} of {source.name} names {shard!r}, which is no safetensors file beside it; "
                "do not trust this checkpoint."
            )
        file = source.file(shard)
        if file is None:
            raise OSError(f"{source.name} lacks {shard}, which its {index.name} names; fetch it again.")
        files.append(file)
    return files


def shapes_in(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Read the shapes of all tensors from the headers of safetensors files, without reading the tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{file} cannot be loaded ({error}): it is damaged or no safetensors file; fetch it again."
            ) from error
    return shapes


def checked(model_class: Any, name: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Check a checkpoint before `model_class.from_pretrained` loads it, and return the arguments to load it with.

    Args:
        model_class: class of the model, with its `config_class`.
        name: folder or repository.
        kwargs: arguments of `from_pretrained`.

    Raises:
        OSError: If files are missing, damaged or out of reach.
        ValueError: If it is another kind of model, in another format, or config and weights contradict each other.
    """
    if kwargs.get("use_safetensors") is False or kwargs.get("gguf_file"):
        raise ValueError("use_safetensors=False and gguf_file are not for explainers, which are safetensors only.")
    ways = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
    source = open_source(name, **{way: kwargs[way] for way in ways if way in kwargs})
    config = _config_of(model_class, source, kwargs)
    files = find_weights(source, kwargs.get("variant"))
    if not kwargs.get("ignore_mismatched_sizes"):
        _compare(source.name, _described(model_class, source.name, config), shapes_in(files))
    # What is forced down again has just come.
    return kwargs | source.pinned | {"use_safetensors": True, "force_download": False}


def _config_of(model_class: Any, source: Source, kwargs: dict[str, Any]) -> PreTrainedConfig:
    path = source.file(CONFIG)
    if path is None:
        raise OSError(f"{source.name} has no {CONFIG}; pass the folder or repository of an explainer.")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kind = stored.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{CONFIG} of {source.name} is damaged ({error}); fetch it again.") from error
    config_class = model_class.config_class
    if kind != config_class.model_type:
        raise ValueError(f"{source.name} is no explainer, but a {kind!r}; pass the name of an explainer.")
    diverting = [key for key in _DIVERTING if stored.get(key)]
    if diverting:
        raise ValueError(f"{CONFIG} of {source.name} sets {diverting[0]}, which explainers do not have; remove it.")
    if source.file("adapter_config.json") is not None:
        raise ValueError(f"{source.name} holds an adapter; load the explainer it is for, then call load_adapter.")
    given = kwargs.get("config")
    if isinstance(given, PreTrainedConfig):
        return given
    if given is not None:
        return config_class.from_pretrained(given)
    # As in transformers, other arguments of from_pretrained change the config; the precision changes no shape.
    own = config_class().to_dict().keys() - {"dtype"}
    return config_class.from_dict(stored, **{key: value for key, value in kwargs.items() if key in own})


def _described(model_class: Any, name: str, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that a config describes; nothing is allocated."""
    try:
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config))
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:
        raise ValueError(f"{CONFIG} of {name} describes no possible model ({error}); fetch it again.") from error
    return {key: tuple(weight.shape) for key, weight in model.state_dict().items()}


def _compare(name: str, described: dict[str, tuple[int, ...]], held: dict[str, tuple[int, ...]]) -> None:
    def told_shape(shapes: dict[str, tuple[int, ...]], key: str) -> str:
        return " x ".join(map(str, shapes[key])) if key in shapes else "nothing"

    keys = described.keys() | held.keys()
    differing = sorted(key for key in keys if described.get(key) != held.get(key))
    if differing:
        key = differing[0]
        raise ValueError(
            f"{name} contradicts itself: for {key}{f' and {len(differing) - 1} others' if differing[1:] else ''} "
            f"{CONFIG} describes {told_shape(described, key)}, but the weights hold {told_shape(held, key)}; fetch it "
            "again, or pass ignore_mismatched_sizes=True to start what does not fit afresh."
        )


def _whole(name: str, path: Path) -> Path:
    """Check a cached file against the hash that the cache names it by; the Hub's client compares only its size."""
    if not path.is_symlink():  # as on file systems without links
        return path
    # A blob that came by Xet is in turn a link, to a file that all repositories share.
    blob, held = path.parent / os.readlink(path), path.resolve()
    expected = blob.name
    if re.fullmatch(r"[0-9a-f]{64}", expected):
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    elif re.fullmatch(r"[0-9a-f]{40}", expected):  # git's own, of a small file
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    else:
        return path
    if found != expected:
        for part in (path, blob, held):
            part.unlink(missing_ok=True)
        raise OSError(f"{path.name} of {name} is damaged: its checksum is wrong. It was removed; try again.")
    return path


def hub_error(error: Exception, name: str, revision: str | None = None) -> OSError:
    """Say in one sentence what went wrong between here and the Hub, and what to do."""
    while isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "an error happened while", says the client
    hub = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return OSError(f"{name!r} is no folder here, and no name of a repository, which is like owner/name.")
    if isinstance(error, GatedRepoError):
        return OSError(f"{name} is gated: ask for access at {hub}/{name}, then log in with `hf auth login`.")
    if isinstance(error, RevisionNotFoundError):
        return OSError(f"{name} has no revision {revision or 'main'!r}; choose a branch, tag or commit of it.")
    if (
        isinstance(error, HfHubHTTPError)
        and status == 401
        and "credentials" in error.response.headers.get("X-Error-Message", "")
    ):
        return OSError(BAD_TOKEN)
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return OSError(
            f"{name} is no folder here, and no repository at {hub} that you may read; check the name or, if it is "
            "private, log in with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, HfHubHTTPError) and status == 404:
        return OSError(f"{name} has no {str(error.response.url).rpartition('/')[2]}; check the name and revision.")
    if isinstance(error, HfHubHTTPError) and status == 429:
        after = error.response.headers.get("Retry-After")
        return OSError(f"{hub} asks to come back later (429); try again{f' in {after} seconds' if after else ''}.")
    if isinstance(error, HfHubHTTPError) and status == 403:
        return OSError(f"{hub} refuses access to {name} with this token (403): {error.server_message or 'forbidden'}.")
    if isinstance(error, HfHubHTTPError):
        return OSError(f"{hub} answered {status} for {name}; try again later.")
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return OSError(
            f"{name} is neither a folder here nor in the cache, and the Hub may not be asked while offline."
        )
    # hf_xet, by which the client moves large files, gives the text alone.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        place = getattr(error, "filename", None)
        return OSError(errno.ENOSPC, f"No space is left for {name}; free some, or set HF_HOME to another disk", place)
    if isinstance(error, OSError) and error.errno is None and "Consistency check" in str(error):
        return OSError(f"{name} came down incomplete; try again.")
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return ConnectionError(f"The connection to {hub} for {name} failed ({error or type(error).__name__}); try again.")


__all__ = ["checked", "find_weights", "hub_error", "open_source", "shapes_in"]
