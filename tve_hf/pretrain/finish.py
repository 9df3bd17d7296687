"""How a run ends: with a checkpoint after a signal, or with its explainer, which is written and pushed."""

import math
import os
import shlex
from dataclasses import asdict

from torch import Tensor

from ..attribution import rule_of
from ..compatibility import quality_in_words
from ..files import dumps, write_whole
from ..hub.model_card import render_card
from ..hub.push import publish
from ..modeling_tve import TVEExplainer
from .checkpointing import UNFINISHED, save_checkpoint, writing
from .held_out_coalitions import HeldOutCoalitions
from .processes import end_together
from .report import validate
from .run import Run

SHOWN_BAD = 100  # of the unreadable images, in training.json


def save(run: Run) -> None:
    """Write a checkpoint."""
    run.progress.sums = run.mean_losses()  # of which that of the main process is written
    progress, limit = run.progress.to_dict(), run.args.save_total_limit
    save_checkpoint(run.accelerator, run.output_dir, run.done, progress, run.position, limit)


def stop(run: Run, number: int) -> None:
    """Save and end, after the signal of this number.

    Raises:
        SystemExit: With 128 + number.
    """
    save(run)
    end_together(run.accelerator)
    run.accelerator.print(f"Stopped by a signal; the same command goes on from step {run.done}.")
    raise SystemExit(128 + number)


def finish(run: Run) -> TVEExplainer:
    """Write the explainer and what belongs to it; push it if that was asked for."""
    accelerator = run.accelerator
    run.model.eval()
    if isinstance(run.held_out, HeldOutCoalitions):
        before = rule_of(run.config)
        if run.held_out.fit_rule(run.model) != before:  # under which the last validation was
            run.progress.log[-1] |= {name: round(value, 6) for name, value in validate(run).items()}
        run.held_out.fit_refinement(run.model)
    run.config.quality = _quality(run)
    weights = accelerator.get_state_dict(run.model)
    explainer = accelerator.unwrap_model(run.model)
    if run.labels and accelerator.is_local_main_process:
        run.labels.path.unlink(missing_ok=True)
    if accelerator.is_main_process:
        _write(run, explainer, weights)
        print(f"The explainer is in {run.output_dir}. {quality_in_words(run.config.quality)}")
        print(f"Next: tve-hf explain photo.jpg --model {shlex.quote(str(run.output_dir))}")
    end_together(accelerator)
    if accelerator.is_main_process and run.args.push_to_hub:
        publish(run.output_dir, run.repo_id, run.args.hub_private_repo)
    return explainer


def _quality(run: Run) -> dict[str, float | int] | None:
    """What the last validation measured, as far as it is finite; None without held-out images."""
    if run.held_out is None:
        return None
    measured = {name: run.progress.log[-1].get(name, math.nan) for name in run.held_out.measures}
    finite = {name: value for name, value in measured.items() if math.isfinite(value)}
    return {"num_images": len(run.held_out.pixel_values), **finite}


def _write(run: Run, explainer: TVEExplainer, weights: dict[str, Tensor]) -> None:
    """Write explainer, processor, `training.json` and card: all of them, or none in the place of others."""
    unfinished = run.output_dir / f"explainer{UNFINISHED}"
    with writing("The explainer", run.output_dir, unfinished):
        # Half precision on disk, float32 when loaded: the config keeps the model's dtype.
        half = {name: weight.half() for name, weight in weights.items()}
        explainer.save_pretrained(unfinished, state_dict=half)
        run.classifier.image_processor.save_pretrained(unfinished)
        bad = {"number": len(run.progress.bad), "first": dict(list(run.progress.bad.items())[:SHOWN_BAD])}
        report = {"arguments": asdict(run.args), "log": run.progress.log, "bad_images": bad}
        (unfinished / "training.json").write_text(dumps(report, indent=1) + "\n")
        for path in unfinished.iterdir():
            os.replace(path, run.output_dir / path.name)
        unfinished.rmdir()
        card = render_card(run.output_dir, [], run.repo_id or None)
        write_whole(run.output_dir / "README.md", card.save)
