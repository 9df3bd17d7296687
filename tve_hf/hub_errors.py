"""What can go wrong between here and the Hub, each in one sentence that says what to do."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

# Of the network, the Hub, the disk, or the question that was asked.
_FAULTS = (httpx.HTTPError, httpx.InvalidURL, OSError, HFValidationError, json.JSONDecodeError)


@contextmanager
def asking_hub(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn faults of the network, the Hub or the question into one sentence; a bug goes through as it is.

    Args:
        name: the repository, collection or owner that the Hub is asked for.
        revision: of the repository, main by default.

    Raises:
        OSError: In the place of what the Hub's client raises for such a fault.
    """
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError, ValueError) as error:
        fault = _cause(error)
        if isinstance(fault, HfHubHTTPError):
            raise _refusal(fault, name, revision) from error
        # hf_xet, by which the client moves large files, knows only this error.
        if isinstance(fault, _FAULTS) or type(fault) is RuntimeError:
            raise _failure(fault, name) from error
        raise


def _cause(error: Exception) -> Exception:
    """What is behind an error that says only that something else failed, as some of the client's do."""
    while isinstance(error.__cause__, Exception) and (
        isinstance(error, LocalEntryNotFoundError) or type(error) in (RuntimeError, ValueError)
    ):
        error = error.__cause__
    return error


def _refusal(error: HfHubHTTPError, name: str, revision: str | None) -> OSError:
    """What the Hub answered, and what to do."""
    hub, status = constants.ENDPOINT, error.response.status_code
    said = " ".join((error.server_message or error.response.reason_phrase).split())
    if isinstance(error, GatedRepoError):
        return OSError(f"{name} is gated: ask for access at {hub}/{name}, then log in with `hf auth login`.")
    if isinstance(error, RevisionNotFoundError):
        return OSError(f"{name} has no revision {revision or 'main'!r}; choose a branch, tag or commit of it.")
    about_token = "credentials" in error.response.headers.get("X-Error-Message", "")
    if status == 401 and (about_token or str(error.response.url).endswith("/whoami-v2")):
        return OSError("The token is not valid; log in again with `hf auth login`, or set HF_TOKEN to another.")
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return OSError(
            f"{name} is no folder here, and no repository at {hub} that you may read; check the name or, if it is "
            "private, log in with `hf auth login` or set HF_TOKEN."
        )
    if status == 403:
        return OSError(f"{hub} refuses access to {name} (403): {said}.")
    if status == 404:
        return OSError(f"{name} has no {str(error.response.url).rpartition('/')[2]}; check the name and revision.")
    if status == 429:
        after = error.response.headers.get("Retry-After")
        return OSError(f"{hub} asks to come back later (429); try again{f' in {after} seconds' if after else ''}.")
    if status < 500:
        return OSError(f"{hub} refuses what it was asked for {name} ({status}): {said}.")
    return OSError(f"{hub} answered {status} for {name}; try again later.")


def _failure(error: Exception, name: str) -> OSError:
    """What went wrong on the way to the Hub, or here, and what to do."""
    hub, text = constants.ENDPOINT, " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, HFValidationError):
        return OSError(f"{name!r} is no folder here, and no name of a repository, which is like owner/name.")
    if isinstance(error, LocalTokenNotFoundError):
        return OSError("There is no token; log in with `hf auth login`, or set HF_TOKEN, to one that may do this.")
    if isinstance(error, LocalEntryNotFoundError):
        return OSError(
            f"{name} is neither a folder here nor in the cache, and the Hub is not asked while offline or with "
            "local_files_only."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return OSError(f"{hub} is not asked for {name} while offline; unset HF_HUB_OFFLINE.")
    if isinstance(error, FileMetadataError | json.JSONDecodeError | httpx.InvalidURL):
        reason = text.partition(". ")[0]
        return OSError(f"{hub} does not answer as the Hub does for {name} ({reason}); check HF_ENDPOINT and proxies.")
    if isinstance(error, httpx.HTTPError):
        return ConnectionError(f"The connection to {hub} for {name} failed ({text}); try again.")
    number, place = getattr(error, "errno", None), getattr(error, "filename", None)
    if number == errno.ENOSPC or "No space left on device" in text:
        return OSError(errno.ENOSPC, f"No space is left for {name}; free some, or set HF_HOME to another disk", place)
    if number is not None:
        return OSError(number, getattr(error, "strerror", text), place)
    if "Consistency check" in text:
        return OSError(f"{name} came down incomplete; try again.")
    return ConnectionError(f"The transfer between here and {hub} for {name} failed ({text}); try again.")


__all__ = ["asking_hub"]
