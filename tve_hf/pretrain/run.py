"""One run of Algorithm 1, put together: its images, the frozen backbone, the explainer, and how far it has come."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers.utils import logging

from ..classifiers import SplitClassifier, split_classifier
from ..classifiers.compiled import with_compiled_passes
from ..classifiers.layout import with_channels_last
from ..configuration_tve import TVEConfig
from ..hub.push import writable
from ..modeling_tve import TVEExplainer
from .arguments import PretrainArguments
from .batches import images_per_step, steps_of
from .checkpointing import Progress, load_checkpoint, remove_unfinished
from .held_out import HeldOut
from .held_out_coalitions import HeldOutCoalitions
from .images import Images, draw_images, first_images, open_images, set_aside
from .label_cache import LabelCache
from .labels import LOSSES, draw, label_weights
from .model import HALF, build_explainer, build_optimizer, choose_attention

logger = logging.get_logger(__name__)

LEAST_HELD_OUT = 2
LABEL_IMAGES = 64  # of the training set, to measure the variances of --normalize_labels on


@dataclass
class Run:
    """What a run trains, with what, and how far it has come.

    Args:
        args: its settings.
        accelerator: has joined its processes.
        repo_id: where the main process will push the explainer; empty if it will not.
        images: to learn from, undecoded.
        steps: of the whole run.
        classifier: in full precision, with the feature maps that the explainer reads.
        teacher: the same in the precision of the training: its backbone is the frozen G.
        config: the explainer's.
        label_weights: of --normalize_labels, as `labels.label_weights` gives them.
        held_out: images to validate on, if there are any.
        model, optimizer, schedule: the explainer and what moves its weights, as Accelerate prepared them.
        progress: what is reported and counted.
        done: steps.
        position: epoch and number of the image that a stream of this process comes to next.
        labels: of --cache_labels.
    """

    args: PretrainArguments
    accelerator: Accelerator
    repo_id: str
    images: Images
    steps: int
    classifier: SplitClassifier
    teacher: SplitClassifier
    config: TVEConfig
    label_weights: Tensor | None
    held_out: HeldOut | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    progress: Progress
    done: int = 0
    position: tuple[int, int] = (0, 0)
    labels: LabelCache | None = None

    output_dir: Path = field(init=False)
    rank: int = field(init=False)
    world: int = field(init=False)
    per_step: int = field(init=False)  # images of all processes together
    device: torch.device = field(init=False)  # of the teacher, and
    dtype: torch.dtype = field(init=False)  # its precision

    def __post_init__(self) -> None:
        self.output_dir = Path(self.args.output_dir)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.per_step = images_per_step(self.args, self.world)
        self.device, self.dtype = self.teacher.device, self.teacher.dtype

    def count_step(self, losses: Tensor, position: tuple[int, int]) -> None:
        """Note that a step was taken, with these losses, and where the stream of this process stands after it."""
        self.progress.sums += losses
        self.progress.since += 1
        self.done, self.position = self.done + 1, position

    def mean_losses(self) -> Tensor:
        """Sums of the losses since the last row of the log, as means over the processes."""
        return self.accelerator.reduce(self.progress.sums.to(self.accelerator.device), "mean").cpu()


def set_up(args: PretrainArguments, accelerator: Accelerator) -> Run:
    """Put a run together, and go on from its last checkpoint if there is one.

    Raises:
        ValueError: If a setting or the images are wrong, or the settings are not those of the checkpoint.
        OSError: If the explainer could not be pushed, or the labels would not fit on the disk.
    """
    repo_id = _repository(args, accelerator)
    images = _open_data(args, accelerator)
    classifier = _split_classifier(args, accelerator)
    images, aside = _set_aside(args, accelerator, images, classifier)
    steps = steps_of(args, images, accelerator.num_processes)
    set_seed(args.seed)
    explainer, classifier = build_explainer(args, classifier)
    config = explainer.config
    teacher = _frozen_teacher(args, accelerator, config)
    weights = _measure_label_weights(args, accelerator, images, steps, classifier, config)
    held_out = _open_held_out(args, accelerator, aside, classifier, config)
    model, optimizer, schedule = _prepare(args, accelerator, explainer, teacher, steps)
    settings = args.fixed() | {
        "num_processes": accelerator.num_processes,
        "number of images": images.number,
        "number of images set aside": aside.number if aside else 0,
        "backbone_fingerprint": config.backbone_fingerprint,
    }
    progress = Progress(settings, sums=torch.zeros(len(LOSSES[config.backgrounds])))
    parts = config, weights, held_out, model, optimizer, schedule, progress
    run = Run(args, accelerator, repo_id, images, steps, classifier, teacher, *parts)
    _resume(run)
    return run


def _repository(args: PretrainArguments, accelerator: Accelerator) -> str:
    """Where to push to, after trying whether that is allowed: better before hours of training than after them."""
    if not (args.push_to_hub and accelerator.is_main_process):
        return ""
    return writable(HfApi(), args.hub_model_id or Path(args.output_dir).resolve().name)


def _open_data(args: PretrainArguments, accelerator: Accelerator) -> Images:
    with accelerator.main_process_first():
        return open_images(args, args.train_files, args.train_split, args.streaming)


def _split_classifier(args: PretrainArguments, accelerator: Accelerator) -> SplitClassifier:
    """The classifier in full precision, with prompts if it is to be validated on a zero-shot one."""
    prompts = args.candidate_labels or None, args.hypothesis_template or None
    classifier = split_classifier(args.classifier, None, torch.float32, False, *prompts).to(accelerator.device)
    classifier = with_channels_last(classifier)
    if args.validation_files or args.validation_split:
        classifier(classifier.probe())  # compares scores of a class, which a zero-shot model may not have: say so
    return classifier


def _set_aside(
    args: PretrainArguments, accelerator: Accelerator, images: Images, classifier: SplitClassifier
) -> tuple[Images, Images | None]:
    """Hold some of the images back to validate on, if no others are named; too few of them would say nothing."""
    if not args.validation_images or args.validation_files or args.validation_split:
        return images, None
    if not classifier.id2label:
        if accelerator.is_main_process:
            logger.warning(
                f"{classifier.name} has no classes to validate on, so nothing will say how good its explainer is; "
                "candidate_labels give it some."
            )
        return images, None
    number = args.validation_images
    if isinstance(images.data, Dataset):  # a step has to be left
        number = min(number, len(images.data) - images_per_step(args, accelerator.num_processes))
    training, aside = set_aside(images, max(0, number), args.seed, args.shuffle_buffer)
    if (aside.number or 0) < LEAST_HELD_OUT:
        if accelerator.is_main_process:
            logger.warning(f"{images.name} hold too few images to set some aside: the explainer will not be measured.")
        return images, None
    accelerator.print(f"{aside.number} random images are not trained on, but measure the explainer.")
    return training, aside


def _frozen_teacher(args: PretrainArguments, accelerator: Accelerator, config: TVEConfig) -> SplitClassifier:
    # Frozen, so in half precision throughout: under autocast its weights would be cast anew in every pass.
    dtype = HALF.get(accelerator.mixed_precision, torch.float32)
    teacher = split_classifier(args.classifier, dtype=dtype).to(accelerator.device)
    teacher = with_channels_last(teacher).reading(tuple(config.feature_names))
    return with_compiled_passes(teacher) if args.torch_compile else teacher


def _measure_label_weights(
    args: PretrainArguments,
    accelerator: Accelerator,
    images: Images,
    steps: int,
    classifier: SplitClassifier,
    config: TVEConfig,
) -> Tensor | None:
    """Those of --normalize_labels; the same when a run is resumed, for images and patches are drawn as before."""
    if not args.normalize_labels:
        return None
    pixel_values = draw_images(images, classifier, LABEL_IMAGES, args.seed, args.shuffle_buffer)
    _, states = draw(args, 0, steps, len(pixel_values), config)
    return label_weights(classifier, config, pixel_values.to(accelerator.device), states.to(accelerator.device))


def _open_held_out(
    args: PretrainArguments,
    accelerator: Accelerator,
    aside: Images | None,
    classifier: SplitClassifier,
    config: TVEConfig,
) -> HeldOut | None:
    """The images of the validation: those that were set aside, or of the files or split that are named for it."""
    if aside is not None:
        pixel_values = first_images(aside, classifier, args.validation_images)
    elif args.validation_files or args.validation_split:
        images = open_images(args, args.validation_files, args.validation_split or "train", args.streaming)
        pixel_values = draw_images(images, classifier, args.validation_images, args.seed, args.shuffle_buffer)
    else:
        return None
    watch = HeldOutCoalitions if config.backgrounds == "random" else HeldOut
    return watch(classifier, pixel_values.to(accelerator.device), config)


def _prepare(
    args: PretrainArguments, accelerator: Accelerator, explainer: TVEExplainer, teacher: SplitClassifier, steps: int
) -> tuple[Any, Any, Any]:
    """Hand explainer, optimizer and schedule to Accelerate."""
    for model in (explainer, teacher.backbone.model):
        choose_attention(model, accelerator.mixed_precision)
    if args.torch_compile:
        explainer.compile()
    optimizer, schedule = build_optimizer(args, explainer, steps, accelerator.num_processes)
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None:  # which would ask the loader, if Accelerate prepared it
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = args.batch_size
    return accelerator.prepare(explainer, optimizer, schedule)


def _resume(run: Run) -> None:
    """Go on from the last checkpoint, if there is one; open the labels on disk, if there are any."""
    accelerator = run.accelerator
    if accelerator.is_main_process:
        remove_unfinished(run.output_dir)
    accelerator.wait_for_everyone()
    saved = load_checkpoint(accelerator, run.output_dir, run.progress.settings)
    if saved:
        run.progress.restore(saved)
        run.done = saved["step"]
        if "positions" in saved:
            epoch, number = saved["positions"][run.rank]
            run.position = epoch, number
        accelerator.print(f"Resumed from step {run.done}.")
    if run.args.cache_labels:
        with accelerator.local_main_process_first():
            # Without a checkpoint nothing says that labels on disk are of these settings and images.
            run.labels = _label_cache(run, saved is None and accelerator.is_local_main_process)
        accelerator.print(f"Exact labels take up to {run.labels.bytes / 1e9:.3g} GB of {run.output_dir}.")


def _label_cache(run: Run, anew: bool) -> LabelCache:
    pairs, bits = run.args.patches_per_image, 0
    if run.config.backgrounds == "random":
        pairs = run.args.coalitions_per_image // 2
        bits = run.args.coalitions_per_image * run.config.num_patches
    return LabelCache(run.output_dir, run.images.number or 0, pairs, run.config.embedding_dim, anew, bits)
