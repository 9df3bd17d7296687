"""Train a ViT-Shapley explainer, the rival of TVE, for one classifier, head included, on unlabelled images.

"Learning to Estimate Shapley Values with Vision Transformers", arXiv 2206.05282, in two stages: a surrogate, a copy of
the classifier, learns to give the classifier's probabilities for masked images (`--surrogate_steps 0` leaves it out
and asks the classifier itself), and then the explainer learns the surrogate's Shapley values. Unlike the paper's
explainer, which is another tuned copy of the classifier, this one is as large as TVE's and reads the features of the
classifier's own pass; removed patches are zero pixels, as everywhere in this package, instead of masked attention.

For the ViT that the package ships, with the layers and images of the TVE explainer beside it, from a clone:

    python examples/train_vit_shapley.py --classifier tve_hf/checkpoints/vit-tiny-tiny-imagenet \
        --train_files 'tiny_imagenet/train-*.parquet' --validation_files 'tiny_imagenet/test-*.parquet' \
        --grid_size 8 --hidden_size 192 --num_hidden_layers 4 --batch_size 32 --surrogate_steps 1250 \
        --surrogate_learning_rate 1e-4 --steps 2000 --save_steps 250 --output_dir vit-shapley-vit-tiny-tiny-imagenet
    tve-hf evaluate --classifier tve_hf/checkpoints/vit-tiny-tiny-imagenet \
        --model tve_hf/checkpoints/tve-vit-tiny-tiny-imagenet --vit_shapley vit-shapley-vit-tiny-tiny-imagenet \
        --test_files 'tiny_imagenet/test-*.parquet' --output_dir vit-shapley-against-tve

That is 2.3 million passes of the classifier. What came of it is in `examples/vit-shapley-vit-tiny-tiny-imagenet`.
`accelerate launch` runs it on several GPUs. Started again with the same arguments, it goes on from a checkpoint.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import Dataset, Image, load_dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedConfig, get_cosine_schedule_with_warmup

from tve_hf import ShapleyConfig, ShapleyExplainer, SplitClassifier, split_classifier
from tve_hf.configuration_tve import BackboneReaderConfig
from tve_hf.images import load_image
from tve_hf.patches import mask_patches
from tve_hf.pretrain import config_for
from tve_hf.pretrain.checkpointing import load_checkpoint, save_checkpoint
from tve_hf.pretrain.model import HALF
from tve_hf.vit_shapley.coalitions import coalition_values, head_fingerprint, random_coalitions, sample_coalitions

Objective = Callable[[nn.Module, Tensor, torch.Generator], Tensor]  # model, pixel_values -> loss


@dataclass
class Arguments:
    classifier: str = field(metadata={"help": "Classifier to explain: a name or folder."})
    train_files: list[str] = field(metadata={"help": "Parquet files (or patterns) with an image column."})
    output_dir: str = field(metadata={"help": "Where checkpoints and the explainer go."})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "Held-out images, likewise."})
    image_column: str = field(default="image")
    grid_size: int | None = field(default=None, metadata={"help": "Patches along a side; derived by default."})
    hidden_size: int = field(default=256)
    num_hidden_layers: int = field(default=2)
    num_attention_heads: int = field(default=4)
    masks_per_image: int = field(default=32, metadata={"help": "Coalitions for each image and step, in pairs."})
    surrogate_steps: int = field(default=1000, metadata={"help": "0: ask the classifier itself about masked images."})
    surrogate_learning_rate: float = field(default=1e-5)
    steps: int = field(default=5000)
    learning_rate: float = field(default=1e-3)
    weight_decay: float = field(default=1e-5)
    warmup_ratio: float = field(default=0.05)
    max_grad_norm: float = field(default=1.0)
    mixed_precision: str = field(default="bf16", metadata={"help": "no, bf16 or fp16."})
    batch_size: int = field(default=64, metadata={"help": "Images per step and process."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints and validations."})
    validation_images: int = field(default=32)
    seed: int = field(default=0)


def load_images(files: list[str], column: str, classifier: SplitClassifier) -> Dataset:
    """Parquet files as a data set of `pixel_values`, (3, H, W)."""
    data = load_dataset("parquet", data_files=files, split="train")
    if column not in data.column_names:
        raise ValueError(f"No column {column!r} in {files}; choose image_column among {', '.join(data.column_names)}.")

    def to_pixels(rows: dict[str, list]) -> dict[str, list[Tensor]]:
        images = [load_image(row) for row in rows[column]]
        return {"pixel_values": list(classifier.image_processor(images, return_tensors="pt")["pixel_values"])}

    return data.select_columns([column]).cast_column(column, Image(decode=False)).with_transform(to_pixels)


def surrogate_objective(classifier: SplitClassifier, grid: tuple[int, int]) -> Objective:
    """KL(f(x) || surrogate(x_s)), one coalition s for each image, of a uniform size from nothing to everything."""

    def loss(surrogate: nn.Module, pixel_values: Tensor, generator: torch.Generator) -> Tensor:
        num_patches = grid[0] * grid[1]
        sizes = torch.randint(num_patches + 1, (len(pixel_values), 1), generator=generator)
        keep = random_coalitions(sizes, num_patches, generator).to(pixel_values.device)
        with torch.no_grad():
            log_prob = classifier.log_prob(classifier.embed(pixel_values))
        logits = surrogate(mask_patches(pixel_values, keep, grid).squeeze(1)).logits.float()
        if classifier.multi_label:  # a class by itself; less a constant
            return F.binary_cross_entropy_with_logits(logits, log_prob.exp(), reduction="none").sum(-1).mean()
        return F.kl_div(logits.log_softmax(-1), log_prob, reduction="batchmean", log_target=True)

    return loss


def explainer_objective(
    classifier: SplitClassifier, surrogate: SplitClassifier, config: ShapleyConfig, num_masks: int
) -> Objective:
    """The loss of `ShapleyExplainer`, whose game is that of the surrogate."""

    def loss(explainer: nn.Module, pixel_values: Tensor, generator: torch.Generator) -> Tensor:
        keep = sample_coalitions(len(pixel_values), config.num_patches, num_masks, generator).to(pixel_values.device)
        with torch.no_grad():
            images = pixel_values.to(classifier.dtype)
            seen = classifier.backbone(images)
            grand = surrogate.log_prob(surrogate.embed(images)).exp()
        return explainer(
            pixel_values=pixel_values,
            features=seen.features,
            embeddings=seen.embeddings,
            probabilities=grand,
            keep=keep,
            coalition_values=coalition_values(surrogate, images, keep, config.grid_size),
        ).loss

    return loss


def train(
    accelerator: Accelerator,
    args: Arguments,
    folder: Path,
    model: nn.Module,
    objective: Objective,
    steps: int,
    learning_rate: float,
    data: Dataset,
    held_out: Tensor | None,
) -> tuple[nn.Module, list[dict]]:
    """Take so many steps of AdamW from the last checkpoint in the folder; return the trained model and its log."""
    loader = DataLoader(data, batch_size=args.batch_size, shuffle=True, drop_last=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=args.weight_decay)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if len(loader) == 0:
        raise ValueError(
            f"{args.train_files} hold fewer images than one batch of {args.batch_size}; lower batch_size."
        )
    world = accelerator.num_processes  # Accelerate steps a prepared schedule once for each process
    warmup = int(args.warmup_ratio * steps)
    schedule = accelerator.prepare(get_cosine_schedule_with_warmup(optimizer, warmup * world, steps * world))
    done, log = 0, []
    saved = load_checkpoint(accelerator, folder, settings={})
    if saved:
        done, log = saved["step"], saved["log"]
    bar = tqdm(total=steps, initial=done, desc=folder.name, disable=not accelerator.is_main_process, unit="step")
    total = torch.zeros(())
    while done < steps:
        loader.set_epoch(done // len(loader))
        for batch in skip_first_batches(loader, done % len(loader)):
            pixel_values = batch["pixel_values"]
            # Seeded by the step, so that a resumed run draws what an uninterrupted one draws.
            seed = (args.seed * steps + done) * world + accelerator.process_index
            generator = torch.Generator().manual_seed(seed)
            mirrored = torch.rand(len(pixel_values), 1, 1, 1, generator=generator) < 0.5
            pixel_values = torch.where(mirrored.to(pixel_values.device), pixel_values.flip(-1), pixel_values)
            loss = objective(model, pixel_values, generator)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(weights, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.detach().float().cpu()
            done += 1
            bar.update()
            if done % args.save_steps == 0 or done == steps:
                row = {"step": done, "loss": total.item() / ((done - 1) % args.save_steps + 1)}
                if held_out is not None:
                    with torch.no_grad():
                        fixed = torch.Generator().manual_seed(0)
                        row["validation_loss"] = objective(model, held_out, fixed).item()
                log.append(row)
                bar.write(json.dumps(row))
                position = done // len(loader), done % len(loader)
                save_checkpoint(accelerator, folder, done, {"log": log}, position, total_limit=1)
                total.zero_()
            if done == steps:
                break
    bar.close()
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return model, log


def config_of(args: Arguments, classifier: SplitClassifier) -> ShapleyConfig:
    """Describe an explainer for this classifier, head included."""
    sizes = {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": args.num_attention_heads,
        "intermediate_size": 4 * args.hidden_size,
    }
    read = config_for(classifier, args.grid_size or classifier.default_grid(), 0, **sizes)
    names = {f.name for f in fields(BackboneReaderConfig)} - {f.name for f in fields(PreTrainedConfig)}
    return ShapleyConfig(
        **{name: getattr(read, name) for name in names},
        id2label=classifier.id2label,
        label2id={label: index for index, label in classifier.id2label.items()},
        head_fingerprint=head_fingerprint(classifier),
    )


def main(arguments: list[str] | None = None) -> ShapleyExplainer:
    """Train surrogate and explainer, and save the latter with its processor and `training.json`."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    )
    set_seed(args.seed)
    folder = Path(args.output_dir)
    classifier = split_classifier(args.classifier, dtype=torch.float32).to(accelerator.device)
    config = config_of(args, classifier)
    explainer = ShapleyExplainer(config).to(accelerator.device)
    data = load_images(args.train_files, args.image_column, classifier)
    held_out = None
    if args.validation_files:
        rows = load_images(args.validation_files, args.image_column, classifier)[: args.validation_images]
        held_out = torch.stack(rows["pixel_values"]).to(accelerator.device)

    surrogate, log = classifier, {}
    if args.surrogate_steps:
        surrogate, log["surrogate"] = train(
            accelerator,
            args,
            folder / "surrogate",
            copy.deepcopy(classifier),
            surrogate_objective(classifier, config.grid_shape),
            args.surrogate_steps,
            args.surrogate_learning_rate,
            data,
            held_out,
        )
    surrogate.requires_grad_(False)
    # Frozen from here on, so in half precision throughout: autocast would cast its weights anew in every pass.
    dtype = HALF.get(accelerator.mixed_precision, torch.float32)
    classifier, surrogate = (copy.deepcopy(model).to(dtype) for model in (classifier, surrogate))
    empty = torch.zeros_like(classifier.probe()[:1])
    with torch.no_grad():
        explainer.null.copy_(surrogate.log_prob(surrogate.embed(empty)).exp()[0])
    explainer, log["explainer"] = train(
        accelerator,
        args,
        folder / "explainer",
        explainer,
        explainer_objective(classifier, surrogate, config, args.masks_per_image),
        args.steps,
        args.learning_rate,
        data,
        held_out,
    )
    explainer.eval()
    if accelerator.is_main_process:
        # Half precision on disk, float32 when loaded: the config keeps the model's dtype.
        half = {name: weight.half() for name, weight in explainer.state_dict().items()}
        explainer.save_pretrained(folder, state_dict=half)
        classifier.image_processor.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps({"arguments": asdict(args), "log": log}, indent=1) + "\n")
    return explainer


if __name__ == "__main__":
    main()
