"""Pre-train an explainer for one backbone on unlabelled images: Algorithm 1, the one training loop."""

import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling_tve import TVEExplainer
from .arguments import PretrainArguments, check
from .batches import Batch, batches_of
from .finish import finish, save, stop
from .labels import LOSSES, draw, exact_labels, model_inputs
from .model import with_sizes_of_explainer
from .processes import StopSignals, join_processes, lock_folder, over_processes, report_killed_workers
from .report import Reports, count_unreadable
from .run import Run, set_up


def pretrain(args: PretrainArguments) -> TVEExplainer:
    """Train an explainer by Eq. 8 and save it, with its processor, card and `training.json`, in `args.output_dir`.

    Started again with the same arguments, an interrupted run goes on from its last checkpoint. On SIGTERM, SIGUSR1 and
    SIGINT, which is Ctrl-C, it writes one and ends.

    Raises:
        ValueError: If a setting or the images are wrong, or the settings are not those of the checkpoint.
        OSError: If nothing can be written, or another run is writing there; the last checkpoint stays intact.
        ChildProcessError: If a process that decodes images was killed; the last checkpoint stays intact.
        SystemExit: After one of these signals, with 128 + the signal's number.
    """
    args = with_sizes_of_explainer(args)
    check(args)
    accelerator = join_processes(args)
    lock = lock_folder(Path(args.output_dir)) if accelerator.is_main_process else nullcontext()
    with report_killed_workers(args.dataloader_num_workers), lock:
        run = set_up(args, accelerator)
        learn(run)
        return finish(run)


def learn(run: Run) -> None:
    """Take all steps that are left, with a row of the log every few, and a validation and a checkpoint every more."""
    args = run.args
    own = args, run.images, run.classifier, run.rank, run.world, run.steps, run.done, run.position
    with StopSignals() as signals, Reports(run) as reports, batches_of(*own) as stream:
        while run.done < run.steps:
            batches: list[Batch] = [next(stream) for _ in range(args.gradient_accumulation_steps)]
            counts = [sum(len(batch.places) for batch in batches), sum(len(batch.bad) for batch in batches)]
            good, bad, asked, late = over_processes(run.accelerator, [*counts, signals.asked > 0, reports.is_late])
            if asked:
                stop(run, signals.asked or signal.SIGTERM)
            if late:
                save(run)
                reports.restart_clock()
            if bad:
                count_unreadable(run, batches)
            if not good:
                raise ValueError(f"No image of step {run.done + 1} could be read; mend {run.images.name}.")
            losses = take_step(run, batches, good)
            run.count_step(losses, batches[-1].position)
            reports.show(losses)
            if run.done % args.save_steps == 0 or run.done == run.steps:
                reports.add_row(validated=True)
                save(run)
                reports.restart_clock()
            elif run.done % args.logging_steps == 0:
                reports.add_row()


def take_step(run: Run, batches: list[Batch], good: int) -> Tensor:
    """Draw patches or coalitions of some images, let the frozen G label them, and take one optimiser step.

    Args:
        batches: one for each forward pass.
        good: how many images all processes together could read for this step.

    Returns:
        This process's share of the losses, one for each of `LOSSES`.

    Raises:
        ValueError: If a loss is not finite.
    """
    args, accelerator = run.args, run.accelerator
    parts = LOSSES[run.config.backgrounds]
    losses = torch.zeros(len(parts))
    drawn = draw(args, run.done, run.steps, run.per_step, run.config)
    for number, batch in enumerate(batches):
        rows = (number * run.world + run.rank) * args.batch_size + batch.places
        pixel_values = batch.pixel_values
        if pixel_values is None:  # the other processes wait for this one's gradients, so an empty image
            rows, pixel_values = torch.zeros(1, dtype=torch.int64), torch.zeros_like(run.classifier.probe()[:1])
        mirrored, states = (values[rows] for values in drawn)
        if run.labels and batch.numbers:
            own = [draw(args, image, run.labels.images, 1, run.config) for image in batch.numbers]
            mirrored, states = (torch.cat(values) for values in zip(*own, strict=True))
        # Every image of the step counts the same, whoever has it and however many could be read.
        weight = len(batch.places) * run.world / good
        with accelerator.accumulate(run.model):
            output = forward(run, pixel_values, mirrored, states, batch.numbers)
            accelerator.backward(output.loss * (weight * len(batches)))
        losses += weight * torch.stack([output[part] for part in parts]).detach().float().cpu()
    if not losses.isfinite().all():
        raise ValueError(
            f"The loss of step {run.done + 1} is not finite; lower learning_rate, or take mixed_precision bf16, "
            "in a new output_dir."
        )
    accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad()
    return losses


def forward(run: Run, pixel_values: Tensor, mirrored: Tensor, states: Tensor, numbers: list[int]) -> Any:
    """The explainer's output, with its loss (Eq. 8), for some images, beside the labels that the frozen G gives them.

    Args:
        pixel_values: the images, (B, 3, H, W).
        mirrored: which of them are, boolean (B,).
        states: their patches, (B, k); or coalitions, boolean (B, K, N).
        numbers: of the images in the data set.
    """
    pixel_values, states = pixel_values.to(run.device, non_blocking=True), states.to(run.device)
    pixel_values = torch.where(mirrored.view(-1, 1, 1, 1).to(run.device), pixel_values.flip(-1), pixel_values)
    with torch.no_grad():  # not inference_mode, whose tensors the explainer could not keep for its backward pass
        images = pixel_values.to(run.dtype)
        seen = run.teacher.backbone(images)
        exact = partial(exact_labels, run.teacher, images, states, run.config)
        labels = run.labels.labels(numbers, exact, states) if run.labels and numbers else exact()
    first, second = (values.to(run.device) for values in labels)
    return run.model(
        pixel_values=pixel_values,
        features=seen.features,
        embeddings=seen.embeddings,
        label_weights=run.label_weights,
        **model_inputs((first, second), states, run.config),
    )
