"""Push an exported graph beside the weights of its explainer."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from ..hub.push import writable
from ..hub_errors import asking_hub


def check_repository(repo_id: str, token: str | bool | None = None) -> str:
    """Return the full name of a repository that exists and that the token may write to.

    Raises:
        OSError: If there is no such repository or token, or the Hub cannot be reached.
    """
    api = HfApi(token=token)
    repo_id = writable(api, repo_id)
    with asking_hub(repo_id):
        api.model_info(repo_id)
    return repo_id


def push(files: Sequence[Path], repo_id: str, token: str | bool | None = None) -> CommitInfo:
    """Add the files of an export to a repository, in one commit; what else is there stays.

    Raises:
        OSError: If the Hub refuses them or cannot be reached; the files stay where they are.
    """
    operations = [CommitOperationAdd(path.name, path) for path in files]
    with asking_hub(repo_id):
        return HfApi(token=token).create_commit(
            repo_id, operations, commit_message=f"Upload {files[0].name}, classifier and explainer as one graph"
        )
