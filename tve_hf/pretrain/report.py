"""What a run says while it learns: a bar, numbers for trackers, rows of its log with pictures, unreadable images."""

import time
from dataclasses import asdict
from types import TracebackType

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..files import dumps, write_whole
from .batches import Batch
from .checkpointing import writing
from .labels import LOSSES
from .run import Run

logger = logging.get_logger(__name__)


class Reports:
    """The reports of a run, in a with-block; the main process alone shows and writes them."""

    def __init__(self, run: Run):
        self.run = run
        plain = {name: value for name, value in asdict(run.args).items() if isinstance(value, int | float | str)}
        run.accelerator.init_trackers("pretrain", plain)
        hidden = not run.accelerator.is_main_process
        self.bar = tqdm(total=run.steps, initial=run.done, disable=hidden, unit="step")
        self.restart_clock()

    def __enter__(self) -> "Reports":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.close()

    def restart_clock(self) -> None:
        """Count time from here on: what a validation or a checkpoint takes is not the rate of learning."""
        self.start, self.begun = time.perf_counter(), self.run.done

    @property
    def images_per_second(self) -> float:
        return (self.run.done - self.begun) * self.run.per_step / (time.perf_counter() - self.start)

    @property
    def is_late(self) -> bool:
        """Whether the last checkpoint is so old that another is due; by the clock of the main process."""
        minutes = self.run.args.save_minutes
        if not (minutes and self.run.accelerator.is_main_process and self.run.done > self.begun):
            return False
        return time.perf_counter() - self.start > 60 * minutes

    def show(self, losses: Tensor) -> None:
        """Show the losses of the last step, as `LOSSES` names them."""
        named = dict(zip(LOSSES[self.run.config.backgrounds], losses.tolist(), strict=True))
        self.bar.set_postfix(named | {"images/s": self.images_per_second}, refresh=False)
        self.bar.update()

    def add_row(self, validated: bool = False) -> None:
        """Add a row of means since the last one to the log, perhaps with a validation, and send it to trackers."""
        run, rate = self.run, {"images_per_second": self.images_per_second}
        means = run.mean_losses() / run.progress.since
        row = {
            "step": run.done,
            "loss": means.sum().item(),
            **dict(zip(LOSSES[run.config.backgrounds], means.tolist(), strict=True)),
            "learning_rate": run.schedule.get_last_lr()[0],
        }
        if validated:
            row |= rate | validate(run)
        run.accelerator.log({name: value for name, value in (rate | row).items() if name != "step"}, run.done)
        run.progress.log.append({key: round(value, 6) for key, value in row.items()})
        run.progress.sums, run.progress.since = torch.zeros_like(means), 0
        if validated and run.accelerator.is_main_process:
            self.bar.write(dumps(run.progress.log[-1]))


def validate(run: Run) -> dict[str, float]:
    """Compare the explainer with what it learns, on held-out images if there are any; draw some of these."""
    if run.held_out is None:
        return {}
    training = run.model.training
    run.model.eval()
    measured, picture = run.held_out.compare(run.model)
    run.model.train(training)
    if run.accelerator.is_main_process:
        with writing("The picture of the validation", run.output_dir):
            write_whole(run.output_dir / f"validation-{run.done}.png", picture.save)
    return measured


def count_unreadable(run: Run, batches: list[Batch]) -> None:
    """Let every process know, and count, the images that one of them could not read.

    Raises:
        ValueError: If there are more than `max_bad_images`.
    """
    gathered = gather_object([batch.bad for batch in batches])
    reasons = {name: reason for batch in gathered for name, reason in batch.items()}
    if run.accelerator.is_main_process:
        for name in reasons.keys() - run.progress.bad.keys():
            logger.warning(f"Skipped {name}: {reasons[name]}")
    run.progress.count_bad(reasons, run.args.max_bad_images, run.images.number, run.done * run.per_step)
