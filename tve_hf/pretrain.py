"""Pre-train an explainer for one backbone on unlabelled images (Algorithm 1): arguments and the one training loop."""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import Dataset, Image, load_dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from .attribution import exact_meta_attribution, prediction_errors, spearman, transfer
from .classifiers import SplitClassifier, split_classifier
from .configuration_tve import TVEConfig
from .images import load_image, normalization
from .modeling_tve import TVEExplainer
from .patches import GridSize, as_pair, sample_patches

logger = logging.get_logger(__name__)

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class PretrainArguments:
    """Settings of one run. Images need no labels; they go through the classifier's own image processor."""

    classifier: str = field(metadata={"help": "Classifier whose backbone is explained: a name or folder."})
    train_files: list[str] = field(metadata={"help": "Parquet files (or patterns) with an image column."})
    output_dir: str = field(metadata={"help": "Where checkpoints and the explainer go."})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "Held-out images, likewise."})
    candidate_labels: list[str] = field(
        default_factory=list, metadata={"help": "Classes of a zero-shot classifier: for validation only."}
    )
    hypothesis_template: list[str] = field(
        default_factory=list, metadata={"help": 'Sentences for them; "This is a photo of {}." by default.'}
    )
    image_column: str = field(default="image")
    grid_size: int | None = field(
        default=None, metadata={"help": "P: patches along a side; derived from the classifier by default."}
    )
    hops: int = field(default=2, metadata={"help": "Radius of a patch's neighbourhood."})
    hidden_size: int = field(default=256)
    num_hidden_layers: int = field(default=2)
    num_attention_heads: int = field(default=4)
    patches_per_image: int = field(default=8, metadata={"help": "k: neighbourhoods sampled per image and step."})
    batch_size: int = field(default=64, metadata={"help": "Images per step and process."})
    num_epochs: int = field(default=2)
    learning_rate: float = field(default=1e-3)
    weight_decay: float = field(default=0.05)
    warmup_ratio: float = field(default=0.05)
    max_grad_norm: float = field(default=1.0)
    flip: bool = field(default=True, metadata={"help": "Mirror every second image."})
    mixed_precision: str = field(default="bf16", metadata={"help": "no, bf16 or fp16."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints and validations."})
    validation_images: int = field(default=32)
    seed: int = field(default=0)


def config_for(classifier: SplitClassifier, grid_size: GridSize | None, hops: int, **sizes: Any) -> TVEConfig:
    """Describe an explainer for this classifier's backbone: its image, grid, features and fingerprint.

    Raises:
        ValueError: If the classifier takes no images, or the grid does not divide them.
    """
    probe = classifier.probe_inputs()
    pixel_values = probe["pixel_values"]
    if pixel_values.ndim != 4:
        raise ValueError(
            f"{classifier.name} takes rows of patches, whose grid depends on the image, but an explainer has one "
            'grid; use `tve_hf.methods.explain("exact", ...)` for it.'
        )
    rows, columns = classifier.default_grid() if grid_size is None else as_pair(grid_size)
    with torch.no_grad():
        output = classifier.backbone(**probe)
    mean, std = normalization(classifier.image_processor)
    return TVEConfig(
        image_size=list(pixel_values.shape[-2:]),
        grid_size=rows if rows == columns else [rows, columns],
        hops=hops,
        embedding_dim=classifier.embedding_dim,
        image_mean=mean,
        image_std=std,
        feature_names=list(classifier.backbone.feature_names),
        feature_dims=[feature.shape[1] for feature in output.features],
        backbone_name=os.path.basename(classifier.name.rstrip("/"))
        if os.path.isdir(classifier.name)
        else classifier.name,
        backbone_fingerprint=classifier.fingerprint(),
        **sizes,
    )


def load_images(files: list[str], column: str, classifier: SplitClassifier) -> Dataset:
    """Open parquet files as a data set that gives `pixel_values`, (3, H, W), through the classifier's processor."""
    data = load_dataset("parquet", data_files=files, split="train")
    if column not in data.column_names:
        raise ValueError(f"No column {column!r} in {files}; choose image_column among {', '.join(data.column_names)}.")
    data = data.select_columns([column]).cast_column(column, Image(decode=False))

    def to_pixels(rows: dict[str, list]) -> dict[str, list[Tensor]]:
        images = [load_image(row) for row in rows[column]]
        return {"pixel_values": list(classifier.image_processor(images, return_tensors="pt")["pixel_values"])}

    return data.with_transform(to_pixels)


@torch.no_grad()
def validate(explainer: TVEExplainer, classifier: SplitClassifier, pixel_values: Tensor) -> dict[str, float]:
    """Compare predicted with exact meta-attributions on held-out images, all patches: errors and median Spearman."""
    config = explainer.config
    output = classifier(pixel_values)
    class_idx = output.logits.argmax(-1)
    found = explainer(pixel_values=pixel_values, features=output.features, embeddings=output.embeddings)
    predicted = found.kept, found.removed
    exact = exact_meta_attribution(classifier, pixel_values, config.grid_size, config.hops)
    errors = prediction_errors(classifier, pixel_values, class_idx, predicted, exact)
    scores = [transfer(kept, removed, classifier, class_idx, "log_prob") for kept, removed in (predicted, exact)]
    return {
        "kept_error": errors["kept_error"].mean().item(),
        "removed_error": errors["removed_error"].mean().item(),
        "spearman": spearman(*scores).nanmedian().item(),
    }


def _checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(output_dir.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))


def _save(accelerator: Accelerator, output_dir: Path, done: int, log: list[dict]) -> None:
    """Write a checkpoint under another name, rename it, and only then remove the ones before it."""
    folder = output_dir / f"checkpoint-{done}"
    unfinished = folder.with_suffix(".partial")
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished), safe_serialization=True)
    if accelerator.is_main_process:
        (unfinished / "progress.json").write_text(json.dumps({"step": done, "log": log}))
        os.replace(unfinished, folder)
        for old in _checkpoints(output_dir)[:-1]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def pretrain(args: PretrainArguments) -> TVEExplainer:
    """Train an explainer by Eq. 8 and save it, with its processor and `training.json`, in `args.output_dir`.

    Started again with the same arguments, an interrupted run goes on from its last checkpoint.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    )
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    classifier = split_classifier(
        args.classifier,
        dtype=torch.float32,
        candidate_labels=args.candidate_labels or None,
        hypothesis_template=args.hypothesis_template or None,
    ).to(accelerator.device)
    if args.validation_files:
        classifier(classifier.probe())  # compares scores of a class, which a zero-shot model may not have: say so now
    sizes = {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": args.num_attention_heads,
        "intermediate_size": 4 * args.hidden_size,
    }
    config = config_for(classifier, args.grid_size, args.hops, **sizes)
    explainer = TVEExplainer(config).to(accelerator.device)
    with torch.no_grad():
        explainer.empty_embedding.copy_(classifier.embed(torch.zeros_like(classifier.probe()))[0])
    # Frozen, so in half precision throughout: under autocast its weights would be cast anew in every pass.
    dtype = HALF.get(accelerator.mixed_precision, torch.float32)
    teacher = split_classifier(args.classifier, dtype=dtype).to(accelerator.device)

    data = load_images(args.train_files, args.image_column, classifier)
    loader = DataLoader(data, batch_size=args.batch_size, shuffle=True, drop_last=True)
    held_out = None
    if args.validation_files:
        held = load_images(args.validation_files, args.image_column, classifier)
        rows = held[: args.validation_images]["pixel_values"]
        held_out = torch.stack(rows).to(accelerator.device)

    decay = [p for p in explainer.parameters() if p.ndim > 1]
    rest = [p for p in explainer.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    model, optimizer, loader = accelerator.prepare(explainer, optimizer, loader)
    steps_per_epoch = len(loader)
    if steps_per_epoch == 0:
        raise ValueError(
            f"{args.train_files} hold fewer images than one batch of {args.batch_size}; lower batch_size."
        )
    steps = args.num_epochs * steps_per_epoch
    schedule = accelerator.prepare(
        # Accelerate steps a prepared schedule once for each process.
        get_cosine_schedule_with_warmup(
            optimizer,
            int(args.warmup_ratio * steps) * accelerator.num_processes,
            steps * accelerator.num_processes,
        )
    )

    done: int = 0
    log: list[dict] = []
    saved = _checkpoints(output_dir)
    if saved:
        accelerator.load_state(str(saved[-1]))
        progress = json.loads((saved[-1] / "progress.json").read_text())
        done, log = progress["step"], progress["log"]
        logger.info(f"Resumed from step {done}.")

    bar = tqdm(total=steps, initial=done, disable=not accelerator.is_main_process, unit="step")
    start, sums = time.perf_counter(), torch.zeros(2)
    for epoch in range(done // steps_per_epoch, args.num_epochs):
        loader.set_epoch(epoch)
        for batch in skip_first_batches(loader, done % steps_per_epoch):
            pixel_values = batch["pixel_values"]
            # Seeded by the step, so that a resumed run draws what an uninterrupted one draws.
            seed = (args.seed * steps + done) * accelerator.num_processes + accelerator.process_index
            generator = torch.Generator().manual_seed(seed)
            if args.flip:
                mirrored = torch.rand(len(pixel_values), generator=generator) < 0.5
                pixel_values = torch.where(
                    mirrored.view(-1, 1, 1, 1).to(pixel_values.device), pixel_values.flip(-1), pixel_values
                )
            patch_idx = sample_patches(len(pixel_values), config.num_patches, args.patches_per_image, generator)
            patch_idx = patch_idx.to(pixel_values.device)
            with torch.no_grad():
                images = pixel_values.to(teacher.dtype)
                seen = teacher.backbone(images)
                kept, removed = exact_meta_attribution(teacher, images, config.grid_size, args.hops, patch_idx)
            output = model(
                pixel_values=pixel_values,
                features=seen.features,
                embeddings=seen.embeddings,
                patch_idx=patch_idx,
                kept_labels=kept,
                removed_labels=removed,
            )
            accelerator.backward(output.loss)
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            sums += torch.stack([output.kept_loss, output.removed_loss]).detach().float().cpu()
            done += 1
            bar.update()
            if done % args.save_steps == 0 or done == steps:
                since = (done - 1) % args.save_steps + 1
                elapsed = time.perf_counter() - start
                row = {
                    "step": done,
                    "kept_loss": sums[0].item() / since,
                    "removed_loss": sums[1].item() / since,
                    "learning_rate": schedule.get_last_lr()[0],
                    "images_per_second": since * args.batch_size * accelerator.num_processes / elapsed,
                }
                if held_out is not None:
                    unwrapped = accelerator.unwrap_model(model).eval()
                    row |= validate(unwrapped, classifier, held_out)
                    unwrapped.train()
                log.append({key: round(value, 6) for key, value in row.items()})
                bar.write(json.dumps(log[-1]))
                _save(accelerator, output_dir, done, log)
                start, sums = time.perf_counter(), torch.zeros(2)
    bar.close()

    explainer = accelerator.unwrap_model(model).eval()
    if accelerator.is_main_process:
        # Half precision on disk, float32 when loaded: the config keeps the model's dtype.
        explainer.save_pretrained(
            output_dir, state_dict={name: weight.half() for name, weight in explainer.state_dict().items()}
        )
        classifier.image_processor.save_pretrained(output_dir)
        report = {"arguments": asdict(args), "log": log}
        (output_dir / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return explainer
