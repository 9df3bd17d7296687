"""Pre-train an explainer for one backbone on unlabelled images (Algorithm 1): the one training loop."""

import os
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from huggingface_hub import HfApi
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..classifiers import split_classifier
from ..files import dumps, write_whole
from ..hub.model_card import render_card
from ..hub.push import publish, writable
from ..modeling_tve import TVEExplainer
from .arguments import PretrainArguments, check
from .batches import Batch, batches_of, steps_of
from .checkpointing import UNFINISHED, Progress, load_checkpoint, remove_unfinished, save_checkpoint, writing
from .held_out import HeldOut
from .held_out_coalitions import HeldOutCoalitions
from .images import draw_images, open_images
from .label_cache import LabelCache
from .labels import LOSSES, draw, exact_labels, label_weights, model_inputs
from .model import build_explainer, build_optimizer, choose_attention, with_sizes_of_explainer
from .processes import StopSignals, alone_in, join_processes, over_processes, part_processes, telling_of_killed_workers

logger = logging.get_logger(__name__)

LABEL_IMAGES = 64  # of the training set, to measure the variances of --normalize_labels on
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Run:
    """One run: what it trains, with what, and how far it has come."""

    def __init__(self, args: PretrainArguments, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self.output_dir = output_dir = Path(args.output_dir)
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.per_step = args.batch_size * args.gradient_accumulation_steps * self.world
        self.repo_id = ""
        if args.push_to_hub and accelerator.is_main_process:
            self.repo_id = writable(HfApi(), args.hub_model_id or output_dir.resolve().name)
        with accelerator.main_process_first():
            self.images = open_images(args, args.train_files, args.train_split, args.streaming)
        self.steps = steps_of(args, self.images, self.world)

        set_seed(args.seed)
        prompts = args.candidate_labels or None, args.hypothesis_template or None
        classifier = split_classifier(args.classifier, None, torch.float32, False, *prompts).to(accelerator.device)
        if args.validation_files or args.validation_split:
            classifier(classifier.probe())  # compares scores of a class, which a zero-shot model may not have: say so
        explainer, self.classifier = build_explainer(args, classifier)
        self.config = config = explainer.config
        # Frozen, so in half precision throughout: under autocast its weights would be cast anew in every pass.
        dtype = HALF.get(accelerator.mixed_precision, torch.float32)
        teacher = split_classifier(args.classifier, dtype=dtype).to(accelerator.device)
        self.teacher = teacher.reading(tuple(config.feature_names))
        self.label_weights: Tensor | None = None
        if args.normalize_labels:  # measured anew when a run is resumed: the same images and patches, so the same
            pixel_values = draw_images(self.images, self.classifier, LABEL_IMAGES, args.seed, args.shuffle_buffer)
            pixel_values = pixel_values.to(accelerator.device)
            _, states = draw(args, 0, self.steps, len(pixel_values), config)
            self.label_weights = label_weights(self.classifier, config, pixel_values, states.to(accelerator.device))
        self.held_out: HeldOut | None = None
        if args.validation_files or args.validation_split:
            held = open_images(args, args.validation_files, args.validation_split or "train", args.streaming)
            pixel_values = draw_images(held, self.classifier, args.validation_images, args.seed, args.shuffle_buffer)
            watch = HeldOutCoalitions if config.backgrounds == "random" else HeldOut
            self.held_out = watch(self.classifier, pixel_values.to(accelerator.device), config)
        self._prepare(explainer)
        self._resume()

    def _prepare(self, explainer: TVEExplainer) -> None:
        """Hand explainer, optimizer and schedule to Accelerate."""
        args, accelerator = self.args, self.accelerator
        for model in (explainer, self.teacher.backbone.model):
            choose_attention(model, accelerator.mixed_precision)
        if args.torch_compile:
            explainer.compile()
        optimizer, schedule = build_optimizer(args, explainer, self.steps, self.world)
        deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
        if deepspeed is not None:  # which would ask the loader, if Accelerate prepared it
            deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = args.batch_size
        self.model, self.optimizer, self.schedule = accelerator.prepare(explainer, optimizer, schedule)

    def _resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        if self.accelerator.is_main_process:
            remove_unfinished(self.output_dir)
        self.accelerator.wait_for_everyone()
        settings = self.args.fixed() | {
            "num_processes": self.world,
            "number of images": self.images.number,
            "backbone_fingerprint": self.config.backbone_fingerprint,
        }
        self.progress = Progress(settings, sums=torch.zeros(len(LOSSES[self.config.backgrounds])))
        self.done, self.position = 0, (0, 0)
        saved = load_checkpoint(self.accelerator, self.output_dir, settings)
        if saved:
            self.progress.restore(saved)
            self.done = saved["step"]
            if "positions" in saved:
                epoch, number = saved["positions"][self.rank]
                self.position = epoch, number
            self.accelerator.print(f"Resumed from step {self.done}.")
        self.labels: LabelCache | None = None
        if self.args.cache_labels:
            pairs, bits = self.args.patches_per_image, 0
            if self.config.backgrounds == "random":
                pairs = self.args.coalitions_per_image // 2
                bits = self.args.coalitions_per_image * self.config.num_patches
            sizes = self.images.number or 0, pairs, self.config.embedding_dim
            with self.accelerator.local_main_process_first():
                # Without a checkpoint nothing says that what is there is of these settings and images.
                anew = saved is None and self.accelerator.is_local_main_process
                self.labels = LabelCache(self.output_dir, *sizes, anew, bits)
            self.accelerator.print(f"Exact labels take up to {self.labels.bytes / 1e9:.3g} GB of {self.output_dir}.")

    def loss(self, pixel_values: Tensor, mirrored: Tensor, states: Tensor, numbers: list[int]) -> Any:
        """The loss on images (B, 3, H, W) of these numbers, mirrored where (B,) says so, and what was drawn of them.

        Args:
            states: patches, (B, k), for Eq. 8; or coalitions, boolean (B, K, N).
        """
        device, config = self.teacher.device, self.config
        pixel_values, states = pixel_values.to(device, non_blocking=True), states.to(device)
        pixel_values = torch.where(mirrored.view(-1, 1, 1, 1).to(device), pixel_values.flip(-1), pixel_values)
        with torch.no_grad():  # not inference_mode, whose tensors the explainer could not keep for its backward pass
            images = pixel_values.to(self.teacher.dtype)
            seen = self.teacher.backbone(images)
            exact = partial(exact_labels, self.teacher, images, states, config)
            labels = self.labels.labels(numbers, exact, states) if self.labels and numbers else exact()
        first, second = (values.to(device) for values in labels)
        return self.model(
            pixel_values=pixel_values,
            features=seen.features,
            embeddings=seen.embeddings,
            label_weights=self.label_weights,
            **model_inputs((first, second), states, config),
        )

    def step(self, batches: list[Batch], good: int) -> Tensor:
        """Take one optimiser step; return this process's share of the losses, (2,): kept and removed; or (1,).

        Args:
            batches: one for each forward pass.
            good: how many images all processes together could read for this step.
        """
        args, accelerator = self.args, self.accelerator
        parts = LOSSES[self.config.backgrounds]
        drawn = draw(args, self.done, self.steps, self.per_step, self.config)
        losses = torch.zeros(len(parts))
        for number, batch in enumerate(batches):
            rows = (number * self.world + self.rank) * args.batch_size + batch.places
            pixel_values = batch.pixel_values
            if pixel_values is None:  # the other processes wait for this one's gradients, so an empty image
                rows, pixel_values = torch.zeros(1, dtype=torch.int64), torch.zeros_like(self.classifier.probe()[:1])
            mirrored, states = (values[rows] for values in drawn)
            if self.labels and batch.numbers:
                own = [draw(args, image, self.labels.images, 1, self.config) for image in batch.numbers]
                mirrored, states = (torch.cat(values) for values in zip(*own, strict=True))
            # Every image of the step counts the same, whoever has it and however many could be read.
            weight = len(batch.places) * self.world / good
            with accelerator.accumulate(self.model):
                output = self.loss(pixel_values, mirrored, states, batch.numbers)
                accelerator.backward(output.loss * (weight * len(batches)))
            losses += weight * torch.stack([output[part] for part in parts]).detach().float().cpu()
        if not losses.isfinite().all():
            raise ValueError(
                f"The loss of step {self.done + 1} is not finite; lower learning_rate, or take mixed_precision bf16, "
                "in a new output_dir."
            )
        accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return losses

    def note_bad(self, batches: list[Batch]) -> None:
        """Let every process know, and count, the images that one of them could not read."""
        found = {
            name: reason for batch in gather_object([batch.bad for batch in batches]) for name, reason in batch.items()
        }
        if self.accelerator.is_main_process:
            for name in found.keys() - self.progress.bad.keys():
                logger.warning(f"Skipped {name}: {found[name]}")
        self.progress.note_bad(found, self.args.max_bad_images, self.images.number, self.done * self.per_step)

    def mean_losses(self) -> Tensor:
        """Sums of the losses since the last report, as means over the processes."""
        return self.accelerator.reduce(self.progress.sums.to(self.accelerator.device), "mean").cpu()

    def report(self, images_per_second: float) -> dict[str, float]:
        """Validate; return the new row of the log."""
        means = self.mean_losses() / self.progress.since
        row = {
            "step": self.done,
            **dict(zip(LOSSES[self.config.backgrounds], means.tolist(), strict=True)),
            "learning_rate": self.schedule.get_last_lr()[0],
            "images_per_second": images_per_second,
        }
        if self.held_out is not None:
            self.model.eval()
            measured, picture = self.held_out.compare(self.model)
            self.model.train()
            row |= measured
            self.accelerator.log(measured, self.done)
            if self.accelerator.is_main_process:
                path = self.output_dir / f"validation-{self.done}.png"
                with writing("The picture of the validation", self.output_dir):
                    write_whole(path, picture.save)
        self.progress.log.append({key: round(value, 6) for key, value in row.items()})
        self.progress.sums, self.progress.since = torch.zeros_like(means), 0
        return self.progress.log[-1]

    def save(self) -> None:
        """Write a checkpoint."""
        told, limit = self.progress.to_dict(), self.args.save_total_limit
        save_checkpoint(self.accelerator, self.output_dir, self.done, told, self.position, limit)

    def stop(self, number: int) -> None:
        """Save and end, after a signal."""
        self.progress.sums = self.mean_losses()
        self.save()
        part_processes(self.accelerator)
        self.accelerator.print(f"Stopped by a signal; the same command goes on from step {self.done}.")
        raise SystemExit(128 + number)

    def finish(self) -> TVEExplainer:
        """Write the explainer and what belongs to it; upload it if that was asked for."""
        weights = self.accelerator.get_state_dict(self.model)
        explainer = self.accelerator.unwrap_model(self.model).eval()
        if self.labels and self.accelerator.is_local_main_process:
            self.labels.path.unlink(missing_ok=True)
        if self.accelerator.is_main_process:
            unfinished = self.output_dir / f"explainer{UNFINISHED}"
            with writing("The explainer", self.output_dir, unfinished):
                # Half precision on disk, float32 when loaded: the config keeps the model's dtype.
                half = {name: weight.half() for name, weight in weights.items()}
                explainer.save_pretrained(unfinished, state_dict=half)
                self.classifier.image_processor.save_pretrained(unfinished)
                bad = {"number": len(self.progress.bad), "first": dict(list(self.progress.bad.items())[:100])}
                report = {"arguments": asdict(self.args), "log": self.progress.log, "bad_images": bad}
                (unfinished / "training.json").write_text(dumps(report, indent=1) + "\n")
                for path in unfinished.iterdir():
                    os.replace(path, self.output_dir / path.name)
                unfinished.rmdir()
                card = render_card(self.output_dir, [], self.repo_id or None)
                write_whole(self.output_dir / "README.md", card.save)
        part_processes(self.accelerator)
        if self.accelerator.is_main_process and self.args.push_to_hub:
            publish(self.output_dir, self.repo_id, self.args.hub_private_repo)
        return explainer


def pretrain(args: PretrainArguments) -> TVEExplainer:
    """Train an explainer by Eq. 8 and save it, with its processor, card and `training.json`, in `args.output_dir`.

    Started again with the same arguments, an interrupted run goes on from its last checkpoint. On SIGTERM and SIGUSR1
    it writes one and ends.

    Raises:
        ValueError: If a setting or the images are wrong, or the settings are not those of the checkpoint.
        OSError: If nothing can be written, or another run is writing there; the last checkpoint stays intact.
        RuntimeError: If a process that decodes images was killed; the last checkpoint stays intact.
        SystemExit: After SIGTERM or SIGUSR1, with 128 + the signal's number.
    """
    args = with_sizes_of_explainer(args)
    check(args)
    accelerator = join_processes(args)
    alone = alone_in(Path(args.output_dir)) if accelerator.is_main_process else nullcontext()
    with telling_of_killed_workers(args.dataloader_num_workers), alone:
        return _train(_Run(args, accelerator))


def _train(run: _Run) -> TVEExplainer:
    """The loop."""
    args, accelerator = run.args, run.accelerator
    told = {name: value for name, value in asdict(args).items() if isinstance(value, int | float | str)}
    accelerator.init_trackers("pretrain", told)
    bar = tqdm(total=run.steps, initial=run.done, disable=not accelerator.is_main_process, unit="step")
    start, begun = time.perf_counter(), run.done
    own = args, run.images, run.classifier, run.rank, run.world, run.steps, run.done, run.position
    with StopSignals() as signals, bar, batches_of(*own) as stream:
        while run.done < run.steps:
            batches: list[Batch] = [next(stream) for _ in range(args.gradient_accumulation_steps)]
            counts = [sum(len(batch.places) for batch in batches), sum(len(batch.bad) for batch in batches)]
            good, bad, asked = over_processes(accelerator, [*counts, int(signals.asked > 0)])
            if asked:
                run.stop(signals.asked or signal.SIGTERM)
            if bad:
                run.note_bad(batches)
            if not good:
                raise ValueError(f"No image of step {run.done + 1} could be read; mend {run.images.name}.")
            losses = run.step(batches, good)
            run.progress.sums += losses
            run.progress.since += 1
            run.done, run.position = run.done + 1, batches[-1].position

            rate = (run.done - begun) * run.per_step / (time.perf_counter() - start)
            told = dict(zip(LOSSES[run.config.backgrounds], losses.tolist(), strict=True))
            shown = {"loss": losses.sum().item(), **told, "images/s": rate}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if run.done % args.logging_steps == 0:
                accelerator.log(shown | {"learning_rate": run.schedule.get_last_lr()[0]}, run.done)
            if run.done % args.save_steps == 0 or run.done == run.steps:
                row = run.report(rate)
                if accelerator.is_main_process:
                    bar.write(dumps(row))
                run.save()
                start, begun = time.perf_counter(), run.done
    return run.finish()
