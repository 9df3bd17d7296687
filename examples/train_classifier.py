"""Train an image classifier to explain: classifier-tuning, full fine-tuning, or from scratch.

The settings of the TVE paper are the defaults: AdamW, learning rate 2e-4, 256 images a step, linear schedule with
warm-up over 5 % of the steps, weight decay 0.05, 5 epochs. Any argument of `transformers.TrainingArguments` changes
them.

    # classifier-tuning: a new head on a frozen backbone, which an explainer of that backbone explains as it is
    python examples/train_classifier.py --classifier google/vit-base-patch16-224 --dataset imagenette \
        --freeze_backbone --output_dir vit-imagenette

    # full fine-tuning: other backbone weights, for which the explainer is tuned in turn
    python examples/train_classifier.py --classifier google/vit-base-patch16-224 --dataset imagenette \
        --output_dir vit-imagenette

    # from scratch, with the architecture of a config
    python examples/train_classifier.py --config small_vit/ --dataset cifar10 --output_dir vit-cifar10

`--dataset` is a name on the Hub or a folder of images, parquet or arrow files. `accelerate launch` runs it on several
GPUs. Started again with the same arguments, it goes on from its last checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, DatasetDict, Image, load_dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from tve_hf import split_classifier
from tve_hf.images import load_image


@dataclass(kw_only=True)
class DataArguments:
    """What is trained on: two splits of an image data set."""

    dataset: str = field(metadata={"help": "Image data set: a name on the Hub, or a folder."})
    train_split: str = field(default="train")
    test_split: str = field(default="test")
    image_column: str = field(default="image")
    label_column: str = field(default="label")


@dataclass(kw_only=True)
class Arguments(DataArguments):
    classifier: str | None = field(default=None, metadata={"help": "Pre-trained model to start from."})
    config: str | None = field(default=None, metadata={"help": "Folder with a model's config, to train from scratch."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the head alone."})
    flip: bool = field(default=True, metadata={"help": "Mirror every second training image."})


@dataclass
class PaperTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's defaults."""

    learning_rate: float = 2e-4
    per_device_train_batch_size: int = 256
    per_device_eval_batch_size: int = 256
    weight_decay: float = 0.05
    warmup_steps: float = 0.05
    num_train_epochs: float = 5.0
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    remove_unused_columns: bool = False
    report_to: str = "none"


class ClassifierTrainer(Trainer):
    """A `Trainer` whose frozen modules stay in eval mode, without dropout.

    Args:
        keep_statistics: whether batch norms keep those that they have learnt. Those of a batch would replace them,
            and where norms were merged into their convolutions, the scale of every layer with them.
    """

    def __init__(self, *args: Any, keep_statistics: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.keep_statistics = keep_statistics

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            own = list(module.parameters())
            is_frozen = own and not any(parameter.requires_grad for parameter in own)
            if is_frozen or (self.keep_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm)):
                module.eval()
        return super().compute_loss(model, *args, **kwargs)


def freeze_backbone(model: PreTrainedModel, image_processor: Any) -> None:
    """Let only the head learn, wherever the split finds it."""
    classifier = split_classifier(model.eval(), image_processor)
    model.requires_grad_(False)
    for name in classifier.backbone.head_names:
        model.get_submodule(name).requires_grad_(True)


def load_data(args: DataArguments) -> tuple[DatasetDict, list[str]]:
    """The two splits, with encoded images, and the names of the classes."""
    data = load_dataset(args.dataset)
    wanted = (args.train_split, args.test_split, args.image_column, args.label_column)
    columns = data[args.train_split].column_names if args.train_split in data else []
    missing = [name for name in wanted if name not in (*data, *columns)]
    if missing:
        raise ValueError(
            f"{args.dataset} has no split or column {missing[0]!r}; it has the splits {', '.join(data)} and the "
            f"columns {', '.join(columns) or 'of another split'}."
        )
    labels = data[args.train_split].features[args.label_column]
    if not isinstance(labels, ClassLabel):
        raise ValueError(f"Column {args.label_column!r} of {args.dataset} holds no class labels; choose another.")
    data = data.select_columns([args.image_column, args.label_column])
    return data.cast_column(args.image_column, Image(decode=False)), labels.names


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, save and return what the held-out images say."""
    args, training = HfArgumentParser((Arguments, PaperTrainingArguments)).parse_args_into_dataclasses(arguments)
    if (args.classifier is None) == (args.config is None):
        raise ValueError("Pass either classifier, a model to start from, or config, to train from scratch.")
    if args.freeze_backbone and args.config is not None:
        raise ValueError("freeze_backbone needs a trained backbone; pass classifier instead of config.")
    set_seed(training.seed)
    data, names = load_data(args)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    image_processor = AutoImageProcessor.from_pretrained(args.classifier or args.config)
    if args.config is not None:
        model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(args.config, **labels))
    else:
        model = AutoModelForImageClassification.from_pretrained(
            args.classifier, ignore_mismatched_sizes=True, dtype=torch.float32, use_safetensors=True, **labels
        )
    if args.freeze_backbone:
        freeze_backbone(model, image_processor)

    def reader(flip: bool) -> Callable[[dict[str, list]], dict[str, list]]:
        def read(rows: dict[str, list]) -> dict[str, list]:
            images = [load_image(row) for row in rows[args.image_column]]
            pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
            if flip:
                mirrored = torch.rand(len(images)) < 0.5
                pixel_values[mirrored] = pixel_values[mirrored].flip(-1)
            return {"pixel_values": list(pixel_values), "labels": rows[args.label_column]}

        return read

    trainer = ClassifierTrainer(
        keep_statistics=args.config is None,
        model=model,
        args=training,
        train_dataset=data[args.train_split].with_transform(reader(args.flip)),
        eval_dataset=data[args.test_split].with_transform(reader(False)),
        processing_class=image_processor,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    started = Path(training.output_dir).is_dir()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir) if started else None)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    if training.push_to_hub:
        trainer.push_to_hub()
    return metrics


if __name__ == "__main__":
    main()
