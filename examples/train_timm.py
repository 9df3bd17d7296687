"""Fine-tune a model of timm, and see at the end of each epoch what it looks at.

A few validation images, drawn by the seed, are explained: their maps go to a sheet of pictures for each epoch, and the
fidelity gap of the maps stands beside loss and accuracy in `summary.csv`. The training is the same as without.

    python examples/train_timm.py --classifier resnet18 --dataset imagenette --output_dir resnet18-imagenette

`--dataset` is a name on the Hub or a folder of images, parquet or arrow files. The model is saved as timm saves for
the Hub: `timm.create_model("local-dir:resnet18-imagenette", pretrained=True)` loads it, names of classes included.
"""

from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import update_summary
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from train_classifier import DataArguments, load_data
from transformers import HfArgumentParser, set_seed

from tve_hf.evaluation import WatchedImages
from tve_hf.images import load_image


@dataclass(kw_only=True)
class Arguments(DataArguments):
    classifier: str = field(metadata={"help": "Name of a model of timm."})
    output_dir: str = field(metadata={"help": "A new folder for the model, summary.csv and sheets of maps."})
    pretrained: bool = field(default=True, metadata={"help": "Start from the weights that timm has for the model."})
    num_explained: int = field(default=4, metadata={"help": "Validation images to explain; 0 explains none."})
    learning_rate: float = 2e-4
    weight_decay: float = 0.05
    num_train_epochs: int = 5
    per_device_train_batch_size: int = 64
    dataloader_num_workers: int = 0
    seed: int = 42


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader, device: str) -> float:
    """Share of the images whose class the model predicts."""
    model.eval()
    right = [model(batch["pixel_values"].to(device)).argmax(1).cpu() == batch["labels"] for batch in batches]
    return torch.cat(right).float().mean().item()


def main(arguments: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    output = Path(args.output_dir)
    if (output / "summary.csv").exists():
        raise ValueError(f"{output} holds another run, in summary.csv; pass a new folder as output_dir.")
    set_seed(args.seed)
    data, names = load_data(args)
    overlay = {"label_names": names}  # by which explanations call the classes
    model = timm.create_model(args.classifier, args.pretrained, pretrained_cfg_overlay=overlay, num_classes=len(names))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def batches(split: str, is_training: bool) -> DataLoader:
        transform = create_transform(**resolve_data_config(model=model), is_training=is_training)

        def read(rows: dict[str, list]) -> dict[str, list]:
            images = [transform(load_image(row)) for row in rows[args.image_column]]
            return {"pixel_values": images, "labels": rows[args.label_column]}

        return DataLoader(
            data[split].with_transform(read),
            batch_size=args.per_device_train_batch_size,
            shuffle=is_training,
            num_workers=args.dataloader_num_workers,
        )

    train, test = batches(args.train_split, True), batches(args.test_split, False)
    drawn = data[args.test_split].shuffle(seed=args.seed)[: args.num_explained]
    watched = WatchedImages(map(load_image, drawn[args.image_column])) if args.num_explained else None
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.learning_rate, weight_decay=args.weight_decay)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=args.num_train_epochs)
    output.mkdir(parents=True, exist_ok=True)
    for epoch in range(args.num_train_epochs):
        model.train()
        losses = []
        for batch in tqdm(train, desc=f"epoch {epoch}"):
            loss = F.cross_entropy(model(batch["pixel_values"].to(device)), batch["labels"].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found = {"accuracy": accuracy(model, test, device)}
        if watched is not None:
            found["fidelity_gap"], sheet = watched(model)
            sheet.save(output / f"explanations-{epoch}.png")
        rate = optimizer.param_groups[0]["lr"]
        update_summary(epoch, {"loss": sum(losses) / len(losses)}, found, output / "summary.csv", lr=rate)
        tqdm.write(" ".join(f"{name} {value:.3g}" for name, value in found.items()))
        scheduler.step(epoch + 1)
    timm.models.save_for_hf(model, output, model_config={"label_names": names}, safe_serialization=True)


if __name__ == "__main__":
    main()
