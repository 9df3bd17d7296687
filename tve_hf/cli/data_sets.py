"""tve-hf explain on a data set: its options, and what it says."""

import argparse
import os
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..attribution import rule_of
from ..classifiers.wrapped import named_weights
from ..fingerprint import fingerprint
from .options import PIPELINE_OPTIONS

# Options of pictures and of images that are named one by one.
_OF_IMAGES = ("images", "images_from", "plain", "blocky", "full_size", "json")


class DataSetRun:
    """Explain a data set, in this process and those that were launched with it.

    Raises:
        ValueError, OSError: If the data cannot be opened, or options exclude one another.
    """

    def __init__(self, args: argparse.Namespace):
        from ..bulk.work import process_of_launch
        from ..sources import open_images

        self.args = args
        if args.dataset_name and args.data_files:
            raise ValueError("Pass the images either as --data-files or as --dataset-name.")
        for name in _OF_IMAGES:
            if getattr(args, name):
                option = "images named one by one" if name == "images" else f"--{name.replace('_', '-')}"
                raise ValueError(f"A data set becomes shards of maps, without pictures; leave out {option}.")
        if args.shard_size < 1:
            raise ValueError(f"--shard-size is {args.shard_size}; give at least 1.")
        self.process = process_of_launch()
        if args.device is None and self.process.world > 1 and torch.accelerator.is_available():
            args.device = _own_device()
        source = args.dataset_name, args.dataset_config, args.split
        self.images = open_images(args.data_files, *source, args.image_column, args.streaming)
        self.finished = self.errors = 0

    def go(self, explainer: Any) -> None:
        """Raise Unwritable or KeyboardInterrupt where that ends the run before its last image."""
        from tqdm.auto import tqdm

        from ..bulk.card import render
        from ..bulk.run import explain_rows
        from ..bulk.shards import Folder, read_settings
        from ..bulk.work import Work, shard_size_for
        from ..pretrain.processes import lock_folder

        args, is_main = self.args, self.process.rank == 0
        begun = read_settings(args.output) or {}
        # A run that goes on may have other processes than the one that began, but has the same shards.
        same = begun.get("num_images") == self.images.number and begun.get("shard_size") == args.shard_size
        size = begun["images_per_shard"] if same else shard_size_for(self.images, args.shard_size, self.process.world)
        settings = self._settings(explainer) | {"shard_size": args.shard_size, "images_per_shard": size}
        folder = Folder(args.output, settings, render(args.output, settings, explainer.quality), is_main)
        work = Work(self.images, size, self.process)
        with lock_folder(args.output) if is_main else nullcontext():
            finished = folder.finished(work.is_own)
            before = sum(finished.values())
            if before and not args.quiet:
                print(f"{self._who()}{before:,} images were done before; the run goes on.")
            hidden = args.quiet or not is_main or not sys.stderr.isatty()
            total = self.images.number if self.process.world == 1 else None
            with tqdm(total=total, initial=before, unit="image", disable=hidden) as bar:
                for number, errors in explain_rows(explainer, work, folder, finished, args.batch_size, bar.update):
                    self.finished += number
                    self.errors += errors

    def _settings(self, explainer: Any) -> dict[str, Any]:
        """What the rows depend on."""
        args = self.args
        by_explainer = explainer.has_explainer and args.method in (None, "tve")
        rule = args.rule or (rule_of(explainer.model.config) if by_explainer else None)
        asked = {name: getattr(args, name) for name in PIPELINE_OPTIONS}
        settings = asked | {
            "source": self.images.name,
            "dataset_config": args.dataset_config,
            "image_column": self.images.column,
            "streaming": args.streaming,
            "num_images": self.images.number,
            "classifier": explainer.classifier.name,
            "classifier_fingerprint": _fingerprint(explainer.classifier.backbone.model),
            "explainer": explainer.model.name_or_path if by_explainer else None,
            "explainer_fingerprint": _fingerprint(explainer.model) if by_explainer else None,
            "dtype": str(explainer.classifier.dtype),
            "method": "tve" if by_explainer else explainer._forward_params["method"],
            "rule": rule,
        }
        return {name: value for name, value in settings.items() if value is not None}

    def _who(self) -> str:
        rank, world = self.process.rank, self.process.world
        return f"Process {rank} of {world}: " if world > 1 else ""

    def stopped(self, code: int) -> int:
        """Say what is left of the run, and return the exit code."""
        print(f"{self._who()}the shards in {self.args.output} are whole; the same command goes on.", file=sys.stderr)
        return code

    def ended(self, seconds: float) -> int:
        """Say how many images are explained, and return the exit code."""
        if not self.args.quiet:
            bad = f", {self.errors:,} of which have an error in the place of a map" if self.errors else ""
            print(
                f"{self._who()}{self.finished:,} images in {seconds:.2f} s, loading the models included{bad}; "
                f"datasets.load_dataset({str(self.args.output)!r}) reads them."
            )
        return 0


def _fingerprint(model: nn.Module) -> str:
    return fingerprint(weight for _, weight in named_weights(model))


def _own_device() -> str:
    """The accelerator of this process, among those of its machine."""
    number = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
    return f"{torch.accelerator.current_accelerator()}:{number}"
