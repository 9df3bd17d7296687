"""Train a small ViT from scratch, distilled from a frozen pretrained classifier.

A few tens of thousands of labelled images are too few for a ViT on its own, so it also learns to agree with a
teacher: with the teacher's embedding (cosine), and with the class probabilities of a linear probe on that embedding.
The probe is cross-fitted, so that the soft labels of an image come from a probe that never saw it.

Two phases share one cosine schedule. First, half of the patch tokens are dropped at random: twice the images per
second, and a strong regulariser. Then all tokens stay, and in every second image a random share of the patches is set
to zero, the mean pixel, so that the classifier meets at training time the masked images that explanations ask about.

    python examples/distill_vit.py --train_files 'tiny_imagenet/train-*.parquet' \
        --test_files 'tiny_imagenet/test-*.parquet' --teacher mobilenet_v2_1.0_224_imagenet --output_dir vit

The whole training set is held in memory as 8-bit pixels. Interrupted, the same command goes on from the last epoch.
"""

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

logger = logging.getLogger("distill_vit")


@dataclass
class Arguments:
    train_files: str
    test_files: str
    teacher: str
    output_dir: str
    image_size: int = 64
    patch_size: int = 8
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 3
    teacher_size: int = 160
    dropped_epochs: int = 34
    masked_epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    seed: int = 0
    compile: bool = True


def load_images(files: str, size: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Read a parquet image data set as uint8 pixels (n, 3, size, size), labels (n,) and class names."""
    data = load_dataset("parquet", data_files=files, split="train")
    processor = ViTImageProcessor(size={"height": size, "width": size}, do_rescale=False, do_normalize=False)
    pixels = [
        processor([image.convert("RGB") for image in batch["image"]], return_tensors="pt")["pixel_values"].to(
            torch.uint8
        )
        for batch in data.iter(batch_size=500)
    ]
    return torch.cat(pixels), torch.tensor(data["label"]), data.features["label"].names


@torch.inference_mode()
def teacher_embeddings(name: str, images: torch.Tensor, size: int) -> torch.Tensor:
    """Unit-length pooled features of the teacher, averaged over the image and its mirror image, (n, D)."""
    teacher = AutoModelForImageClassification.from_pretrained(name).eval().to(memory_format=torch.channels_last)
    processor = AutoImageProcessor.from_pretrained(name)
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (processor.image_mean, processor.image_std))
    rows = []
    for batch in images.split(100):
        x = F.interpolate((batch.float() - mean) / std, size=size, mode="bicubic")
        x = torch.cat([x, x.flip(-1)]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = teacher.base_model(x).pooler_output.float()
        rows.append(F.normalize(hidden.unflatten(0, (2, -1)).mean(0), dim=-1))
    return torch.cat(rows)


def cross_fitted_probe(x: torch.Tensor, y: torch.Tensor, folds: int = 4, epochs: int = 12) -> torch.Tensor:
    """Class logits (n, C) of linear probes on standardised features, each row by a probe fitted without it."""
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    logits = torch.empty(len(x), int(y.max()) + 1)
    fold = torch.randperm(len(x)) % folds
    for k in range(folds):
        inside = (fold != k).nonzero().squeeze(1)
        probe = nn.Linear(x.shape[1], logits.shape[1])
        optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.3)
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / epochs)
            for index in inside[torch.randperm(len(inside))].split(512):
                F.cross_entropy(probe(x[index]), y[index], label_smoothing=0.05).backward()
                optimizer.step()
                optimizer.zero_grad()
        logits[fold == k] = probe(x[fold == k]).detach()
    return logits


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to an eighth of the side, mirror, change brightness and contrast at random; uint8 -> float."""
    n, _, height, width = images.shape
    pad = height // 8
    x = F.pad(images.float(), (pad,) * 4, mode="reflect")
    top, left = (torch.randint(0, 2 * pad + 1, (n, 1, 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(height).view(1, -1, 1), left + torch.arange(width).view(1, 1, -1)
    mirror = torch.rand((n, 1, 1), generator=generator) < 0.5
    columns = torch.where(mirror, columns.flip(-1), columns)
    x = x.permute(0, 2, 3, 1)[torch.arange(n).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2)
    contrast, brightness = (0.6 + 0.8 * torch.rand((n, 1, 1, 1), generator=generator) for _ in range(2))
    mean = x.mean((1, 2, 3), keepdim=True)
    return ((x - mean) * contrast + mean * brightness).clamp(0, 255)


def mask_patches(x: torch.Tensor, patch_size: int, generator: torch.Generator) -> torch.Tensor:
    """In half of the images, set a share of the patches, uniform in [0, 0.9], to zero."""
    n, _, height, width = x.shape
    share = 0.9 * torch.rand((n, 1, 1, 1), generator=generator) * (torch.rand((n, 1, 1, 1), generator=generator) < 0.5)
    keep = torch.rand((n, 1, height // patch_size, width // patch_size), generator=generator) >= share
    return x * F.interpolate(keep.to(x.dtype), size=(height, width), mode="nearest")


class TokenDropout:
    """Forward hook on a ViT's embeddings: keep the class token and a random half of the patch tokens."""

    enabled = False

    def __call__(self, module: nn.Module, args: tuple, tokens: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return tokens
        n, length, _ = tokens.shape
        kept = 1 + torch.rand(n, length - 1).argsort(1)[:, : (length - 1) // 2]
        index = torch.cat([torch.zeros(n, 1, dtype=kept.dtype), kept], dim=1)
        return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


@torch.inference_mode()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        predicted = torch.cat([model(batch).logits.argmax(-1) for batch in x.split(250)])
    return (predicted == y).float().mean().item()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)

    images, labels, names = load_images(args.train_files, args.image_size)
    test_images, test_labels, _ = load_images(args.test_files, args.image_size)
    cache = output / "teacher.pt"
    if not cache.exists():
        features = teacher_embeddings(args.teacher, images, args.teacher_size)
        soft = cross_fitted_probe(features, labels)
        logger.info("cross-fitted teacher probe: accuracy %.4f", (soft.argmax(1) == labels).float().mean())
        torch.save({"features": features.half(), "logits": soft.half()}, cache)
    teacher = torch.load(cache, weights_only=True)

    config = ViTConfig(
        image_size=args.image_size,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=4 * args.hidden_size,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    processor = ViTImageProcessor(
        size={"height": args.image_size, "width": args.image_size},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (processor.image_mean, processor.image_std))
    model = ViTForImageClassification(config)
    dropout = TokenDropout()
    model.vit.embeddings.register_forward_hook(dropout)
    to_teacher = nn.Linear(args.hidden_size, teacher["features"].shape[1])

    decay = [p for p in [*model.parameters(), *to_teacher.parameters()] if p.ndim > 1]
    no_decay = [p for p in [*model.parameters(), *to_teacher.parameters()] if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    epochs = args.dropped_epochs + args.masked_epochs
    steps_per_epoch = len(images) // args.batch_size
    steps = epochs * steps_per_epoch
    schedule = get_cosine_schedule_with_warmup(optimizer, int(args.warmup_ratio * steps), steps)

    def student(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = model.vit(x).last_hidden_state[:, 0]
        return model.classifier(embedding), to_teacher(embedding)

    step_forward = torch.compile(student) if args.compile else student
    state_file, log = output / "state.pt", []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        to_teacher.load_state_dict(state["to_teacher"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        log = state["log"]
        logger.info("resumed after epoch %d", len(log))

    test_x = (test_images.float() - mean) / std
    for epoch in range(len(log), epochs):
        dropout.enabled = epoch < args.dropped_epochs
        torch.manual_seed(args.seed + 1 + epoch)
        generator = torch.Generator().manual_seed(args.seed + 1 + epoch)
        order = torch.randperm(len(images), generator=generator)
        start, total = time.perf_counter(), 0.0
        model.train()
        for step in range(steps_per_epoch):
            index = order[step * args.batch_size : (step + 1) * args.batch_size]
            x = (augment(images[index], generator) - mean) / std
            if not dropout.enabled:
                x = mask_patches(x, args.patch_size, generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits, feature = step_forward(x)
            soft = teacher["logits"][index].float().softmax(-1)
            loss = (
                F.cross_entropy(logits.float(), labels[index], label_smoothing=0.1)
                + 2 * F.kl_div(logits.float().log_softmax(-1), soft, reduction="batchmean")
                + 2 * (1 - F.cosine_similarity(feature.float(), teacher["features"][index].float())).mean()
            )
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        dropout.enabled = False
        model.eval()
        row = {
            "epoch": epoch + 1,
            "loss": round(total / steps_per_epoch, 4),
            "test_accuracy": round(accuracy(model, test_x, test_labels), 4),
            "images_per_second": round(steps_per_epoch * args.batch_size / (time.perf_counter() - start), 1),
        }
        log.append(row)
        logger.info("%s", row)
        state = {
            "model": model.state_dict(),
            "to_teacher": to_teacher.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "log": log,
        }
        torch.save(state, state_file.with_suffix(".tmp"))
        os.replace(state_file.with_suffix(".tmp"), state_file)

    # Half precision on disk, float32 when loaded: the config keeps the model's dtype.
    model.save_pretrained(output, state_dict={name: weight.half() for name, weight in model.state_dict().items()})
    processor.save_pretrained(output)
    (output / "training.json").write_text(json.dumps({"arguments": asdict(args), "log": log}, indent=1) + "\n")


if __name__ == "__main__":
    main()
