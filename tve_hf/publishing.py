"""Upload what a run made to the Hub: asked for at its start, done at its end."""

import time
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import httpx  # the HTTP client that it uses
from transformers.utils import logging

logger = logging.get_logger(__name__)

ATTEMPTS = 5
FAILURES = (OSError, httpx.HTTPError)  # of the network and of the Hub


def prepare_repository(repo_id: str, private: bool) -> str:
    """Make sure that this user may write to a repository, which is made if there is none; return its full name.

    Raises:
        ValueError: If there is no valid token, or it may not write there.
    """
    api = HfApi()
    try:
        user = api.whoami()["name"]
    except FAILURES as error:
        raise ValueError(
            f"push_to_hub needs the Hub and a token ({' '.join(str(error).split())}); run `hf auth login` or set "
            "HF_TOKEN."
        ) from error
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
    except FAILURES as error:
        raise ValueError(
            f"{user} may not write to {repo_id} on the Hub ({' '.join(str(error).split())}); pass another "
            "hub_model_id, or a token that may write."
        ) from error
    return repo_id


def upload(folder: Path, repo_id: str) -> None:
    """Upload a finished run, without its checkpoints and logs; a failing upload is tried again, ever more slowly.

    Raises:
        OSError: If it fails every time; the files stay where they are.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            HfApi().upload_folder(
                folder_path=folder,
                repo_id=repo_id,
                ignore_patterns=["checkpoint-*", "logs/*", "*.partial*"],
                commit_message="Explainer pre-trained by tve_hf",
            )
            return
        except FAILURES as error:
            if attempt == ATTEMPTS:
                raise OSError(
                    f"{folder} is complete, but could not be uploaded to {repo_id} "
                    f"({' '.join(str(error).split())}); run `hf upload {repo_id} {folder}`."
                ) from error
            logger.warning(f"Upload to {repo_id} failed ({error}); trying again.")
            time.sleep(2**attempt)
