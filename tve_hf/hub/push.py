"""Push a checkpoint to the Hub: files and card, checked before anything is sent, in one commit."""

import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    BadRequestError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.utils import logging
from yaml import YAMLError

from ..files import dumps
from ..hub_errors import asking_hub
from ..weights import INDEX, check_report, find_weights, open_source
from .model_card import PICTURE, read_json, render_card, report_file, task_of
from .remote_code import code_files, config_with_code

logger = logging.get_logger(__name__)

ATTEMPTS = 5
# What a checkpoint consists of, beside its weights; its card comes on top.
FILES = ("config.json", "preprocessor_config.json", "training.json")
_CARD = "README.md"
_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
# Weights that an older push may have left, which would be loaded instead of the new ones, or beside them.
_WEIGHTS = re.compile(r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?")


@dataclass(frozen=True)
class Push:
    """A checked push; `str` says what it would do, `send` does it."""

    repo_id: str
    branch: str
    private: bool | None
    exists: bool
    files: dict[str, Path | bytes]  # by name in the repository
    removed: list[str]
    left_out: list[str]
    token: str | bool | None = None

    def __str__(self) -> str:
        kind = "the existing" if self.exists else "a new private" if self.private else "a new"
        lines = [f"To {kind} repository {self.repo_id}, branch {self.branch}, in one commit:"]
        for name, content in self.files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            lines.append(f"  send    {name}, {size:,} bytes")
        lines += [f"  remove  {name}, weights of an older version" for name in self.removed]
        lines += [f"  leave   {name}, not a part of a checkpoint" for name in self.left_out]
        return "\n".join(lines)

    def send(self) -> CommitInfo:
        """Create repository and branch where they do not exist, and commit; a failed commit changes no file there.

        Raises:
            ValueError: If the Hub refuses the card's metadata.
            OSError: If it refuses anything else, or cannot be reached.
        """
        api = HfApi(token=self.token)
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in self.files.items()]
        operations += [CommitOperationDelete(name) for name in self.removed]
        with asking_hub(self.repo_id, self.branch):
            if not self.exists:
                api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            if self.branch != "main":
                api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
            try:
                return api.create_commit(
                    self.repo_id, operations, commit_message="Upload checkpoint and card", revision=self.branch
                )
            except ValueError as error:
                if type(error) is not ValueError or not isinstance(error.__cause__, BadRequestError):
                    raise
                reason = " ".join(str(error).split())
        raise ValueError(f"{api.endpoint} does not take the card: {reason}")


def prepare(
    folder: Path,
    repo_id: str,
    results: list[Path] | None = None,
    card: Path | None = None,
    private: bool | None = None,
    branch: str | None = None,
    token: str | bool | None = None,
    measured: bool = True,
    license: str | None = None,
) -> Push:
    """Check a checkpoint, its card, the token and the repository; nothing is sent, and the folder stays as it is.

    An explainer goes with the code that it needs where this package is not installed.

    Args:
        folder: checkpoint, with config.json, training.json and safetensors.
        repo_id: owner/name; without owner, the token's.
        results: what `tve-hf evaluate` wrote, which the card of an explainer needs.
        card: must be what `render_card` makes of folder and results, under any repository's name; by default the
            folder's README.md if there is one. It is sent with the name of this repository, and this licence.
        private: whether a new repository is to be private.
        branch: main by default.
        token: of the Hub; by default the one of HF_TOKEN or `hf auth login`.
        measured: whether an explainer must come with results; the card says so if it does not.
        license: of the weights, by its name on the Hub; that of the card by default.

    Raises:
        ValueError: If the checkpoint is incomplete, not finite or holds pickles, or the card says something else than
            the results.
        OSError: If there is no token, it may not write there, or the Hub cannot be reached.
    """
    results = results or []
    files = _checked_files(folder)
    if read_json(folder / "config.json")["model_type"] == "tve":
        files["config.json"] = config_with_code(folder).encode()
        files |= {name: text.encode() for name, text in code_files().items()}
    if measured and not results and read_json(folder / "config.json")["model_type"] == "tve":
        raise ValueError(
            f"{folder} needs measured results; run `tve-hf evaluate` and pass its reports as --results, or pass "
            "--unmeasured."
        )
    results, license_of_card = _as_in_card(folder, results, card)
    license = license or license_of_card
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in {*files, _CARD})

    branch = branch or "main"
    api = HfApi(token=token)
    repo_id = writable(api, repo_id)
    files[_CARD] = str(render_card(folder.resolve(), results, repo_id, license)).encode()
    with asking_hub(repo_id, branch):
        pushed_before = _files_in(api, repo_id, branch, private)
    removed = [name for name in pushed_before or [] if _WEIGHTS.fullmatch(name) and name not in files]
    return Push(repo_id, branch, private, pushed_before is not None, files, removed, left_out, token)


def publish(folder: Path, repo_id: str, private: bool) -> None:
    """Push what a training run has made, without results; a push that fails is tried again, ever more slowly.

    Raises:
        OSError: If it fails every time; the files stay where they are.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            prepare(folder, repo_id, private=private or None, measured=False).send()
            return
        except OSError as error:
            if attempt == ATTEMPTS:
                command = shlex.join(["tve-hf", "push", str(folder), repo_id, "--unmeasured", "--yes"])
                raise OSError(
                    f"{folder} is complete, but could not be pushed to {repo_id} ({error}); run "
                    f"`{command}{' --private' if private else ''}`."
                ) from error
            logger.warning(f"The push to {repo_id} failed ({error}); trying again.")
            time.sleep(2**attempt)


def _checked_files(folder: Path) -> dict[str, Path | bytes]:
    """The files to send, by name; they load, and their weights are finite."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; pass that of a checkpoint.")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ValueError(f"{folder} holds {pickles[0]}, which may be a pickle and run code; remove it.")
    source = open_source(folder)
    missing = [name for name in FILES if source.file(name) is None]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}; pass a folder that a training command wrote.")
    weights = find_weights(source)
    for path in weights:
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():
                if not torch.isfinite(tensors.get_tensor(key)).all():
                    raise ValueError(f"{path} holds NaN or infinity in {key}; train it again before pushing it.")
    _check_loads(folder)
    picture = [path for path in [folder / PICTURE] if path.is_file()]
    files: dict[str, Path | bytes] = {
        path.name: path for path in [*(folder / name for name in FILES), *weights, *picture]
    }
    if len(weights) > 1:  # some of them maybe of a folder beside this one, which is not sent
        index = read_json(folder / INDEX)
        index["weight_map"] = {name: Path(shard).name for name, shard in index["weight_map"].items()}
        files[INDEX] = (dumps(index, indent=1) + "\n").encode()
    return files


def _check_loads(folder: Path) -> None:
    """Refuse a checkpoint whose config and weights do not fit each other."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    is_classifier = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    kind = AutoModelForImageClassification if is_classifier else AutoModel
    # Explainers check themselves.
    _, report = kind.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=is_classifier,
    )
    # Classifiers are often saved with more than they use, such as a pooler.
    check_report(str(folder), report | {"unexpected_keys": set()})


def _as_in_card(folder: Path, results: list[Path], card: Path | None) -> tuple[list[Path], str | None]:
    """The results in the order of the card, which says what they say, and the licence that it names."""
    for path in results:
        model = str(read_json(report_file(path)).get("settings", {}).get("model"))
        if Path(model).name != folder.resolve().name:
            raise ValueError(f"{path} is a report on {model}, not on {folder}; pass the reports of this checkpoint.")
    own = folder / _CARD
    card = card or (own if own.is_file() else None)
    try:
        text = card.read_text(encoding="utf-8") if card else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The card {card} cannot be read ({error}); leave it out to render a new one.") from error
    # What pre-training wrote there, before there were results, makes way for them.
    if card is None or (card == own and text.strip() == str(render_card(folder.resolve(), [])).strip()):
        render_card(folder.resolve(), results)
        return results, None
    # The order of tasks in the card is free, and so are the repository's name and the licence.
    results = sorted(results, key=lambda path: text.find(f"### {task_of(path)}\n"))
    named = re.search(r'model="([^"]+)"', text)
    license = _license_in(card, text)
    rendered = str(render_card(folder.resolve(), results, named[1] if named else None, license))
    lines, expected = text.strip().splitlines(), rendered.strip().splitlines()
    if lines != expected:
        pairs = zip([*lines, ""], [*expected, ""], strict=False)
        number, (said, meant) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
        raise ValueError(
            f"The card {card} does not say what the results say: line {number} is {said[:80]!r}, expected "
            f"{meant[:80]!r}; render it again with `tve-hf card`."
        )
    return results, license


def _license_in(card: Path, text: str) -> str | None:
    """The licence in the metadata of a card."""
    try:
        return ModelCard(text).data.license
    except (ValueError, YAMLError) as error:
        raise ValueError(f"The metadata of the card {card} cannot be read ({error}); render it again.") from error


def writable(api: HfApi, repo_id: str) -> str:
    """The full name of a repository that the token may write to, if it exists, or else may create.

    `HfApi.auth_check` knows only of repositories that exist, and most are new.

    Raises:
        OSError: If there is no token, it may not write there, or the Hub cannot be reached.
    """
    with asking_hub(repo_id):
        me = api.whoami()
    repo_id = repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
    validate_repo_id(repo_id)
    namespace = repo_id.split("/")[0]
    roles = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])} | {me["name"]: "admin"}
    if namespace not in roles or roles[namespace] == "read":
        raise OSError(
            f"{me['name']} may not write to {namespace}; push to {me['name']}/{repo_id.split('/')[1]} instead."
        )
    token = me.get("auth", {}).get("accessToken", {})
    scoped = token.get("fineGrained", {}).get("scoped", [])
    allowed = [scope for scope in scoped if scope["entity"].get("name") in (namespace, repo_id)]
    fine = any("repo.write" in scope["permissions"] for scope in allowed)
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and not fine):
        raise OSError(
            f"The token {token.get('displayName')!r} may only read {repo_id}; log in with one that may write to it."
        )
    return repo_id


def _files_in(api: HfApi, repo_id: str, branch: str, private: bool | None) -> list[str] | None:
    """Names of the repository's files, on the branch or where it would start; None if there is no repository."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    if private and not info.private:
        raise ValueError(f"{repo_id} exists and is public; make it private in its settings first, or push without it.")
    try:
        return api.list_repo_files(repo_id, revision=branch)
    except RevisionNotFoundError:
        return api.list_repo_files(repo_id)
