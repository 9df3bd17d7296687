"""Checkpoints that are complete or absent."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

# Of a stream whose length is unknown, this many images are read before the share of bad ones counts.
MIN_IMAGES = 1000
UNFINISHED = ".partial"  # a folder that is being written or removed
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# So says `torch.save`, without a number, when the system refuses to write.
TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed writing", "unexpected pos", "iostream error")


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(output_dir.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))


def remove_unfinished(output_dir: Path) -> None:
    """Remove what an earlier process was writing or removing when it was killed."""
    for folder in output_dir.glob(f"*{UNFINISHED}"):
        shutil.rmtree(folder)


def sync_to_disk(folder: Path) -> None:
    """Bring the files of a folder to the disk, so that a rename after it cannot outlive them in a power cut."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, a quota or the largest size of a file was at its end, whichever library wrote."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None:
        chain.append(following)
        following = following.__cause__ or following.__context__
    numbered = any(
        (isinstance(link, OSError) and link.errno in DISK_IS_FULL)
        or (isinstance(link, SafetensorError) and any(f"(os error {number})" in str(link) for number in DISK_IS_FULL))
        for link in chain
    )
    # All of them: torch also complains of a file that another error has cut short.
    return numbered or all(any(words in str(link) for words in TORCH_CANNOT_WRITE) for link in chain)


@contextmanager
def writing(what: str, output_dir: Path, unfinished: Path | None = None) -> Iterator[None]:
    """Let a with-block write, perhaps in the folder `unfinished`, which is removed if the block fails.

    Raises:
        OSError: In place of whatever the many writers raise when the disk is full; it says what is left. Every other
            error stays as it is.
    """
    try:
        yield
    except Exception as error:  # each writer has its own class for a full disk; all others are raised again
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)
        if not is_disk_full(error):
            raise
        last = checkpoints(output_dir)
        left = f"{last[-1]} is intact" if last else "there is no earlier checkpoint"
        raise OSError(
            f"{what} could not be written in {output_dir} ({' '.join(str(error).split())}); {left}. "
            "Free some space and run the same command again."
        ) from error


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    progress: dict[str, Any],
    position: tuple[int, int],
    total_limit: int,
) -> None:
    """Write a checkpoint under another name, rename it, and only then remove those beyond `total_limit`.

    Args:
        progress: what the loop needs to go on, as JSON; from the main process.
        position: where the stream of this process stands.

    Raises:
        OSError: If it cannot be written; no part of it stays behind, and earlier checkpoints are untouched.
    """
    folder = output_dir / f"checkpoint-{step}"
    if folder.exists():  # a run that was stopped where it had been resumed
        return
    unfinished = folder.with_suffix(UNFINISHED)
    positions = gather_object([position])
    accelerator.wait_for_everyone()
    with writing(f"The checkpoint of step {step}", output_dir, unfinished):
        accelerator.save_state(str(unfinished), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            text = json.dumps({"step": step, **progress, "positions": positions})
            (unfinished / "progress.json").write_text(text)
            sync_to_disk(unfinished)
            os.replace(unfinished, folder)
            for old in checkpoints(output_dir)[:-total_limit]:
                doomed = old.with_suffix(UNFINISHED)
                os.replace(old, doomed)  # half removed, it must not look complete
                shutil.rmtree(doomed)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, output_dir: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Load the last complete checkpoint into what `accelerator` prepared, and return its progress.

    Raises:
        ValueError: If the run that wrote it had other settings; each is named.
    """
    saved = checkpoints(output_dir)
    if not saved:
        return None
    progress = json.loads((saved[-1] / "progress.json").read_text())
    theirs = progress.get("settings", {})
    changed = [
        f"{name} was {theirs[name]!r} and is {value!r}"
        for name, value in json.loads(json.dumps(settings)).items()
        if name in theirs and theirs[name] != value
    ]
    if changed:
        raise ValueError(
            f"{saved[-1]} is of a run with other settings: {'; '.join(changed)}. "
            "Pass the old ones to go on with it, or another output_dir to start anew."
        )
    accelerator.load_state(str(saved[-1]))
    return progress


@dataclass
class Progress:
    """What a run knows besides its weights: all of it is in every checkpoint.

    Args:
        settings: that a resumed run must share.
        log: a row for every few steps.
        sums: of the losses since the last row, as `labels.LOSSES` names them.
        since: steps since then.
        bad: images that could not be read, name -> reason.
    """

    settings: dict[str, Any]
    log: list[dict[str, float]] = field(default_factory=list)
    sums: Tensor = field(default_factory=lambda: torch.zeros(2))
    since: int = 0
    bad: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(self).items()}

    def restore(self, saved: dict[str, Any]) -> None:
        self.log, self.bad = saved["log"], saved.get("bad", {})
        self.sums, self.since = torch.tensor(saved.get("sums", [0.0, 0.0])), saved.get("since", 0)

    def count_bad(self, reasons: dict[str, str], share: float, number: int | None, read: int) -> None:
        """Count images that could not be read; raises ValueError if they are too many of `number`, or of `read`."""
        self.bad |= reasons
        if len(self.bad) > share * (number or max(read, MIN_IMAGES)):
            first = ", ".join(list(self.bad)[:5])
            raise ValueError(
                f"{len(self.bad)} images could not be read, more than max_bad_images={share}: {first}"
                f"{', ...' if len(self.bad) > 5 else ''}. Mend or remove them, or raise max_bad_images."
            )
