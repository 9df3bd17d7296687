"""Fine-tune a pretrained CNN on classes that it knows, so that it recognises them on small and on large photographs.

The classes are those of a set of small labelled images. Large photographs without labels come along, one to three of
the small ones, and for them the CNN learns what it said itself before, restricted to these classes: it shall not
forget. In a third of all images random patches are grey, the zero of the normalised image, so that the classifier
meets the masked images that explanations ask about. Norm layers keep their statistics.

    python examples/finetune_cnn.py --classifier mobilenet_v2_1.0_224_imagenet --image_size 160 \
        --train_files 'tiny_imagenet/train-*.parquet' --unlabelled_files 'photos/train-*.parquet' \
        --test_files 'tiny_imagenet/test-*.parquet' --large_test_files 'imagenet_samples/test-*.parquet' \
        --output_dir mobilenet-v2

All images are held in memory as 8-bit pixels. Interrupted, the same command goes on from the last checkpoint.
"""

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Features, Image, load_dataset
from torch import Generator, Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from tve_hf.coalitions import Coalitions

logger = logging.getLogger("finetune_cnn")


@dataclass
class Arguments:
    classifier: str
    train_files: list[str]
    unlabelled_files: list[str]
    test_files: list[str]
    large_test_files: list[str]
    output_dir: str
    classifier_license: str = "apache-2.0"  # of the pretrained weights, for the card
    image_size: int = 160
    patch_size: int = 16
    epochs: int = 2
    batch_size: int = 64
    learning_rate: float = 2e-4
    weight_decay: float = 0.02
    warmup_ratio: float = 0.05
    save_steps: int = 100
    seed: int = 0


def load_images(files: list[str], size: int, labelled: bool = True) -> tuple[Tensor, Tensor, list[str]]:
    """Read a parquet image data set: centre squares as uint8 (n, 3, size, size), labels (n,), names of classes."""
    columns = ["image", "label"] if labelled else ["image"]
    features = None if labelled else Features({"image": Image()})
    data = load_dataset("parquet", data_files=files, split="train", columns=columns, features=features)
    pixels = torch.empty(len(data), 3, size, size, dtype=torch.uint8)
    for i, image in enumerate(data["image"]):
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        square = image.convert("RGB").resize((size, size), box=(left, top, left + side, top + side), resample=2)
        pixels[i] = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).movedim(2, 0)
    if not labelled:
        return pixels, torch.zeros(len(data), dtype=torch.long), []
    return pixels, torch.tensor(data["label"]), data.features["label"].names


def match_classes(names: list[str], synonyms: dict[int, str]) -> tuple[list[int], list[str]]:
    """Which class of the pretrained CNN each name is, and a name that people read: "tabby cat" for "tabby".

    Args:
        names: the first of each class's synonyms.
        synonyms: of the CNN's classes, "tabby, tabby cat".

    Raises:
        ValueError: If the CNN does not know a class, or two of that name.
    """
    known = {index: text.split(", ") for index, text in synonyms.items()}
    indices, readable = [], []
    for name in names:
        found = [index for index, words in known.items() if words[0] == name]
        if len(found) != 1:
            raise ValueError(f"{len(found)} classes of the classifier are called {name!r}; one is needed.")
        longer = [text for text in known[found[0]] if text.startswith(f"{name} ") or text.endswith(f" {name}")]
        indices.append(found[0])
        readable.append((longer or [name])[0])
    return indices, readable


def with_classes(model: PreTrainedModel, indices: list[int], names: list[str]) -> None:
    """Keep these classes of the model's head alone."""
    head = model.classifier
    kept = nn.Linear(head.in_features, len(indices))
    with torch.no_grad():
        kept.weight.copy_(head.weight[indices])
        kept.bias.copy_(head.bias[indices])
    model.classifier = kept
    model.num_labels = model.config.num_labels = len(names)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}


def normalise(pixels: Tensor, size: int) -> Tensor:
    """Pixels 0 to 255 as the classifier reads them, float (B, 3, size, size) from -1 to 1."""
    x = pixels.float() / 127.5 - 1
    if x.shape[-1] != size:
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return x.to(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(model: PreTrainedModel, pixels: Tensor, size: int) -> Tensor:
    """Logits, (n, C)."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model(normalise(batch, size)).logits.float() for batch in pixels.split(50)])


def augment(pixels: Tensor, size: int, least: float, generator: Generator) -> Tensor:
    """Cut out a square of a random `least` to 1 of the area, mirror, change brightness and contrast; normalised."""
    number = len(pixels)
    low = torch.tensor([least**0.5, -1.0, -1.0, 0.8, 0.8])
    high = torch.tensor([1.0, 1.0, 1.0, 1.2, 1.2])
    scale, x, y, contrast, brightness = (torch.rand(number, 5, generator=generator) * (high - low) + low).unbind(1)
    mirror = torch.where(torch.rand(number, generator=generator) < 0.5, -1.0, 1.0)
    zeros = torch.zeros(number)
    theta = torch.stack([scale * mirror, zeros, x * (1 - scale), zeros, scale, y * (1 - scale)], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [number, 3, size, size], align_corners=False)
    cut = F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    mean = cut.mean((1, 2, 3), keepdim=True)
    changed = (cut - mean) * contrast.view(-1, 1, 1, 1) + mean * brightness.view(-1, 1, 1, 1)
    return normalise(changed.clamp(0, 255), size)


def mask(x: Tensor, patch_size: int, generator: Generator) -> Tensor:
    """Set random patches of every third image to zero."""
    side = x.shape[-1] // patch_size
    chosen = torch.rand(len(x), generator=generator) < 1 / 3
    keep = Coalitions("smooth", scale=0.7).draw(len(x), 2, (side, side), generator)[:, 0] | ~chosen[:, None]
    return x * F.interpolate(keep.view(-1, 1, side, side).float(), scale_factor=patch_size, mode="nearest")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)

    processor = AutoImageProcessor.from_pretrained(args.classifier)
    if list(processor.image_mean) != [0.5] * 3 or list(processor.image_std) != [0.5] * 3:
        raise ValueError(f"{args.classifier} does not read pixels from -1 to 1, as those prepared here are.")
    model = AutoModelForImageClassification.from_pretrained(args.classifier, dtype=torch.float32)
    native = processor.crop_size["height"]

    small, labels, names = load_images(args.train_files, 64)
    large, _, _ = load_images(args.unlabelled_files, 3 * args.image_size // 2, labelled=False)
    indices, readable = match_classes(names, model.config.id2label)
    with_classes(model, indices, readable)
    model.to(memory_format=torch.channels_last)

    test, test_labels, _ = load_images(args.test_files, 64)
    photos, photo_labels, photo_names = load_images(args.large_test_files, args.image_size)
    known = torch.tensor([names.index(name) if name in names else -1 for name in photo_names])[photo_labels]
    photos, known = photos[known >= 0], known[known >= 0]

    def accuracies() -> dict[str, float]:
        right = predict(model, test, args.image_size).argmax(1) == test_labels
        right_large = predict(model, photos, args.image_size).argmax(1) == known
        return {
            "test_accuracy": round(right.float().mean().item(), 4),
            "large_test_accuracy": round(right_large.float().mean().item(), 4),
            "large_test_images": len(known),
        }

    cache = output / "teacher.pt"
    if not cache.exists():
        logger.info("before: %s", accuracies())
        torch.save(predict(model, large, native).softmax(-1), cache)
    soft = torch.load(cache, weights_only=True)

    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    of_large = args.batch_size // 4
    of_small = args.batch_size - of_large
    per_epoch = len(small) // of_small
    steps = args.epochs * per_epoch
    schedule = get_cosine_schedule_with_warmup(optimizer, int(args.warmup_ratio * steps), steps)
    saved, log = output / "state.pt", []
    start = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(state[name])
        start, log = state["step"], state["log"]
        logger.info("resumed after step %d", start)

    began, total = time.perf_counter(), torch.zeros(2)
    for step in range(start, steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(small), generator=Generator().manual_seed(epoch))
        chosen = order[place * of_small : (place + 1) * of_small]
        generator = Generator().manual_seed(args.seed * steps + step)
        others = torch.randint(len(large), (of_large,), generator=generator)
        x = [augment(small[chosen], args.image_size, 0.5, generator)]
        x.append(augment(large[others], args.image_size, 0.4, generator))
        # Norm layers stay as they are, and dropout is the head's alone.
        model.eval()
        model.dropout.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(mask(torch.cat(x), args.patch_size, generator)).logits.float()
        loss = F.cross_entropy(logits[:of_small], labels[chosen], label_smoothing=0.1)
        distilled = F.kl_div(logits[of_small:].log_softmax(-1), soft[others], reduction="batchmean")
        ((of_small * loss + of_large * distilled) / args.batch_size).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += torch.stack([loss, distilled]).detach()
        if (step + 1) % args.save_steps == 0 or step + 1 == steps:
            number = (step - start) % args.save_steps + 1
            rate = number * args.batch_size / (time.perf_counter() - began)
            row = {"step": step + 1, "loss": round(total[0].item() / number, 4)}
            row |= {"distillation_loss": round(total[1].item() / number, 4), "images_per_second": round(rate, 1)}
            if (step + 1) % (5 * args.save_steps) == 0 or step + 1 == steps:
                row |= accuracies()
            log.append(row)
            logger.info("%s", row)
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1, "log": log}
            torch.save(state, saved.with_suffix(".tmp"))
            os.replace(saved.with_suffix(".tmp"), saved)
            began, total = time.perf_counter(), torch.zeros(2)

    # Half precision on disk, float32 when loaded: the config keeps the model's dtype.
    model.config.image_size = args.image_size
    model.save_pretrained(output, state_dict={name: weight.half() for name, weight in model.state_dict().items()})
    processor.size, processor.crop_size = (
        {"shortest_edge": args.image_size},
        {"height": args.image_size, "width": args.image_size},
    )
    processor.save_pretrained(output)
    (output / "training.json").write_text(json.dumps({"arguments": asdict(args), "log": log}, indent=1) + "\n")


if __name__ == "__main__":
    main()
