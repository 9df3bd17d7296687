"""Settings of a pre-training run, and what is wrong with them, said before anything is loaded."""

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..coalitions import Coalitions, check_number
from ..patches import REMOVALS, TOKEN_DROP, as_pair

# What may differ when a run is resumed, for the weights do not feel it.
CHANGEABLE = {
    "output_dir",
    "candidate_labels",
    "hypothesis_template",
    "validation_files",
    "validation_split",
    "max_bad_images",
    "dataloader_num_workers",
    "save_steps",
    "save_minutes",
    "save_total_limit",
    "logging_steps",
    "validation_images",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}


def _field(default: Any, text: str) -> Any:
    """A setting with its help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class PretrainArguments:
    """Settings of one run. Images need no labels; they go through the classifier's own image processor."""

    classifier: str = field(metadata={"help": "Classifier whose backbone is explained: a name or folder."})
    output_dir: str = field(metadata={"help": "Where checkpoints and the explainer go."})
    train_files: list[str] = _field(
        [], "Parquet, arrow, tar (webdataset) or image files, patterns of one kind, or folders of images."
    )
    validation_files: list[str] = _field([], "Held-out images, likewise.")
    dataset_name: str | None = _field(
        None, "Instead of files: a data set of the Hub, or a folder (parquet, save_to_disk, images, webdataset)."
    )
    dataset_config: str | None = _field(None, "Its configuration.")
    train_split: str = _field("train", "Its split to train on.")
    validation_split: str | None = _field(None, "Its split of held-out images.")
    candidate_labels: list[str] = _field([], "Classes of a zero-shot classifier: for validation only.")
    hypothesis_template: list[str] = _field([], 'Sentences for them; "This is a photo of {}." by default.')
    image_column: str | None = _field(None, "Column of the images; found where there is one or it is called image.")
    streaming: bool = _field(False, "Read the images in passing, without a copy on disk.")
    shuffle_buffer: int = _field(10_000, "Images from which the next is drawn at random while streaming.")
    random_resized_crop: bool = _field(False, "Cut a random 20-100 %% of each image, as MAE does.")
    flip: bool = _field(True, "Mirror every second image.")
    max_bad_images: float = _field(0.01, "Share of images that may be unreadable; they are skipped.")
    dataloader_num_workers: int = _field(0, "Processes that decode images, for each process that trains.")

    explainer: str | None = _field(None, "Explainer to start from: a name or folder. Its grid and sizes are kept.")
    grid_size: int | None = _field(None, "P: patches along a side; derived from the classifier by default.")
    hops: int = _field(2, "Radius of a patch's neighbourhood.")
    hidden_size: int = _field(256, "Width of the explainer.")
    num_hidden_layers: int = _field(2, "Its transformer layers.")
    num_attention_heads: int = _field(4, "Heads of each.")

    backgrounds: str = _field("antithetical", "antithetical, the paper's two states (Eq. 6), or random (Eq. 3).")
    coalitions: str = _field("smooth", "Distribution of random backgrounds: smooth, independent, uniform or shapley.")
    coalition_prob: float = _field(0.5, "Of independent ones: with which each patch is kept.")
    coalition_scale: float | None = _field(
        None, "Of smooth ones: deviation of the fields' blur, in patches; a tenth of the grid's side by default."
    )
    label_removals: list[str] = _field(["zero"], "What replaces removed pixels of random backgrounds, in turn.")

    patches_per_image: int = _field(8, "k: neighbourhoods sampled per image and step.")
    coalitions_per_image: int = _field(16, "K: random backgrounds sampled per image and step, in pairs.")
    batch_size: int = _field(64, "Images per process and forward pass.")
    gradient_accumulation_steps: int = _field(1, "Forward passes per step.")
    num_epochs: int = _field(2, "Passes over the images.")
    max_steps: int = _field(0, "Steps, instead of epochs if above 0; needed where the number of images is unknown.")
    cache_labels: bool = _field(False, "Keep each image's patches and flip, and their exact labels on disk.")
    normalize_labels: bool = _field(False, "Divide the squared error of each dimension by its variance.")
    learning_rate: float = _field(1e-3, "Peak learning rate.")
    weight_decay: float = _field(0.05, "Of the weights with two dimensions or more.")
    warmup_ratio: float = _field(0.05, "Share of the steps in which the learning rate rises.")
    max_grad_norm: float = _field(1.0, "Gradients are scaled down to this norm.")
    mixed_precision: str = _field("bf16", "no, bf16 or fp16.")
    torch_compile: bool = _field(False, "Compile the explainer, and the classifier's passes of masked images.")
    seed: int = _field(0, "Of the weights, the order of the images and all draws.")

    save_steps: int = _field(500, "Steps between checkpoints, each with a validation.")
    save_minutes: float = _field(30.0, "Minutes after which there is a checkpoint between them; 0 for none.")
    save_total_limit: int = _field(1, "Checkpoints to keep.")
    logging_steps: int = _field(10, "Steps between rows of the log, in training.json and for trackers.")
    validation_images: int = _field(
        32,
        "Held-out images of each validation, drawn at random: of the validation files or split, or else of the "
        "training images, an eighth of them at most and not trained on, of a stream of its first shuffle_buffer. "
        "0: none, so that nothing says how good the explainer is.",
    )
    report_to: list[str] = _field([], "Trackers, such as tensorboard or wandb.")
    push_to_hub: bool = _field(False, "Upload the explainer and its card when the run is over.")
    hub_model_id: str | None = _field(None, "Repository to upload to; the name of output_dir by default.")
    hub_private_repo: bool = _field(False, "Make a new repository private.")

    def states(self) -> dict[str, Any]:
        """What embeddings the explainer predicts the means of, as `TVEConfig` has it."""
        names = ("backgrounds", "coalitions", "coalition_prob", "coalition_scale", "label_removals")
        return {name: getattr(self, name) for name in names}

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must have in common with its checkpoint."""
        values = asdict(self) | {"max_steps": max(0, self.max_steps)}
        return {name: value for name, value in values.items() if name not in CHANGEABLE}


def check_patches(number: int, grid: tuple[int, int]) -> None:
    """Raise ValueError if a grid has fewer patches than are to be sampled."""
    rows, columns = grid
    if number > rows * columns:
        raise ValueError(
            f"patches_per_image={number} is more than the {rows * columns} patches of a grid of {rows} x {columns}; "
            "lower it."
        )


def _check_states(args: PretrainArguments) -> None:
    """Refuse backgrounds that do not exist, or that do not fit the grid."""
    grid = None if args.grid_size is None else as_pair(args.grid_size)
    if args.backgrounds == "antithetical":
        if args.label_removals != ["zero"]:
            raise ValueError(
                'label_removals are those of random backgrounds; leave it out or pass backgrounds="random".'
            )
        if grid is not None:
            check_patches(args.patches_per_image, grid)
        return
    if args.backgrounds != "random":
        raise ValueError(f"Unknown backgrounds {args.backgrounds!r}; choose antithetical or random.")
    check_number(args.coalitions_per_image)
    for removal in args.label_removals:
        if removal not in (*REMOVALS, TOKEN_DROP):
            raise ValueError(
                f"Unknown removal operator {removal!r} in label_removals; choose among {', '.join(REMOVALS)} and "
                f"{TOKEN_DROP}."
            )
    if not 1 <= len(args.label_removals) <= args.coalitions_per_image // 2:
        raise ValueError(
            f"label_removals names {len(args.label_removals)} operators, and each needs a pair of coalitions; name at "
            f"least one, and pass coalitions_per_image={max(2, 2 * len(args.label_removals))} or more."
        )
    if grid is not None:
        Coalitions(args.coalitions, args.coalition_prob, args.coalition_scale).check(grid)


def check(args: PretrainArguments) -> None:
    """Refuse settings that would fail later.

    Raises:
        ValueError: Naming the setting and what to do.
        OSError: If nothing can be written in `output_dir`.
    """
    if bool(args.train_files) == bool(args.dataset_name):
        raise ValueError("Pass the images either as train_files or as dataset_name.")
    if args.validation_split and not args.dataset_name:
        raise ValueError("validation_split is a split of dataset_name; pass validation_files beside train_files.")
    at_least_one = ("patches_per_image", "batch_size", "gradient_accumulation_steps", "save_steps")
    for name in (*at_least_one, "save_total_limit", "logging_steps", "shuffle_buffer"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}, it must be at least 1.")
    for name in ("validation_images", "save_minutes"):
        if getattr(args, name) < 0:
            raise ValueError(f"{name} is {getattr(args, name)}, it must be 0, for none, or more.")
    if not args.validation_images and (args.validation_files or args.validation_split):
        raise ValueError("validation_images=0 asks for no validation; leave it, or the images of the validation, out.")
    if args.num_epochs < 1 and args.max_steps < 1:
        raise ValueError("num_epochs and max_steps are both 0 or less; pass one of them.")
    if not 0 <= args.max_bad_images <= 1:
        raise ValueError(f"max_bad_images is {args.max_bad_images}, a share between 0 and 1 is needed.")
    for name in ("streaming", "random_resized_crop"):
        if args.cache_labels and getattr(args, name):
            raise ValueError(f"cache_labels keeps labels of images that stay as they are; leave it or {name} out.")
    _check_states(args)
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in args.report_to:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"Unknown tracker {name!r} in report_to; choose among {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if name not in installed:
            raise ValueError(f"The tracker {name!r} in report_to is not installed; run `pip install {name}`.")
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()
    except OSError as error:
        raise OSError(
            f"Nothing can be written in output_dir {args.output_dir!r} ({error}); choose another."
        ) from error
