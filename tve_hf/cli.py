"""The command line: tve-hf explain | pretrain | evaluate | card."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def _default_photograph() -> Any:
    try:
        from skimage import data
    except ImportError:
        raise ValueError(
            "No image was given, and the example photograph of scikit-image is not installed; "
            "pass an image, or run `pip install tve_hf[demo]`."
        ) from None
    return data.chelsea()  # a cat, CC0


def _write(path: Path, save: Callable[[Path], Any]) -> None:
    """Write beside the file and rename, so that no half-written file stays behind."""
    unfinished = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        save(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _stem(image: str, taken: set[str]) -> str:
    """A file name for an image's results, different from those already taken."""
    base = Path(image.split("?")[0].rstrip("/")).stem[:100] or "image"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    taken.add(name)
    return name


def explain(arguments: list[str]) -> int:
    """Explain images: one overlay for each class and one JSON with the raw maps for each image."""
    parser = argparse.ArgumentParser("tve-hf explain", description=explain.__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="path or URL; an example photograph if none")
    parser.add_argument("--classifier", help="name or folder of an image classifier; the shipped one by default")
    parser.add_argument("--model", help="name or folder of an explainer of its backbone; the shipped one by default")
    parser.add_argument("--label", action="append", help="explain this class instead of the predicted one; repeatable")
    parser.add_argument("--top-k", type=int, help="explain the k most probable classes")
    parser.add_argument("--verify", type=int, metavar="N", help="compare with exact scores on N random patches")
    parser.add_argument("--output", type=Path, default=Path("explanations"), metavar="DIR", help="where results go")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each image instead of text")
    args = parser.parse_args(arguments)

    start = time.perf_counter()
    from tqdm.auto import tqdm
    from transformers import pipeline
    from transformers.utils import logging

    from . import DEFAULT_EXPLAINER

    logging.disable_progress_bar()
    imported = time.perf_counter() - start
    options: dict[str, Any] = {"classifier": args.classifier} if args.classifier else {}
    asked = {"label": args.label, "top_k": args.top_k, "verify": args.verify}
    asked = {name: value for name, value in asked.items() if value is not None}
    images: list[tuple[str, Any]] = [(image, image) for image in args.images]
    if not images:
        images = [("chelsea.png", _default_photograph())]
    start = time.perf_counter()
    explainer = pipeline("transferable-attribution", model=args.model or str(DEFAULT_EXPLAINER), **options, **asked)
    args.output.mkdir(parents=True, exist_ok=True)

    failed = 0
    taken: set[str] = set()
    for name, image in tqdm(images, unit="image", disable=len(images) == 1 or not sys.stderr.isatty()):
        try:
            results = explainer(image)
        except (ValueError, TypeError, OSError) as error:
            failed += 1
            tqdm.write(f"tve-hf: {error}", file=sys.stderr)
            continue
        stem = _stem(name, taken)
        record: dict[str, Any] = {"image": name, "explanations": []}
        for rank, result in enumerate(results):
            path = args.output / (f"{stem}.png" if len(results) == 1 else f"{stem}.{rank + 1}.png")
            _write(path, result.pop("overlay").save)
            del result["heatmap"]
            result["attribution"] = result["attribution"].tolist()
            record["explanations"].append({**result, "overlay": str(path)})
        text = json.dumps(record)
        _write(args.output / f"{stem}.json", partial(Path.write_text, data=text + "\n"))
        if args.json:
            print(text)
            continue
        for result in record["explanations"]:
            print(f"{name}: {result['label']} ({result['score']:.1%}) -> {result['overlay']} [rule {result['rule']}]")
            if "verification" in result:
                found = result["verification"]
                print(
                    f"  against the exact scores of {found['num_patches']} patches: Spearman {found['spearman']:.2f}"
                )
    if not args.json:
        work = time.perf_counter() - start
        print(f"{len(images) - failed} of {len(images)} images in {work:.2f} s, after {imported:.1f} s of imports")
    return 1 if failed else 0


def pretrain(arguments: list[str]) -> int:
    """Pre-train an explainer for a classifier's backbone on unlabelled images."""
    from transformers import HfArgumentParser

    from .pretrain import PretrainArguments
    from .pretrain import pretrain as run

    (args,) = HfArgumentParser(PretrainArguments, prog="tve-hf pretrain").parse_args_into_dataclasses(arguments)
    run(args)
    return 0


def evaluate(arguments: list[str]) -> int:
    """Measure an explainer on held-out images: agreement with exact, and fidelity beside other methods."""
    from transformers import HfArgumentParser

    from .benchmark import EvaluateArguments
    from .benchmark import evaluate as run

    (args,) = HfArgumentParser(EvaluateArguments, prog="tve-hf evaluate").parse_args_into_dataclasses(arguments)
    print(json.dumps(run(args)["summary"], indent=1))
    return 0


def card(arguments: list[str]) -> int:
    """Render a checkpoint's model card from its config, training log and evaluation reports."""
    from .model_card import render_card

    parser = argparse.ArgumentParser("tve-hf card", description=card.__doc__)
    parser.add_argument("folder", type=Path, help="checkpoint folder with config.json and training.json")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="reports of tve-hf evaluate, <task>.json")
    parser.add_argument("--output", type=Path, required=True, help="where the card goes")
    args = parser.parse_args(arguments)
    _write(args.output, render_card(args.folder, args.results).save)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "explain": explain,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "card": card,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake ends with one sentence and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        print("usage: tve-hf COMMAND ...\n")
        for name, command in COMMANDS.items():
            print(f"  {name:10} {(command.__doc__ or '').splitlines()[0]}")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except (ValueError, TypeError, OSError) as error:
        print(f"tve-hf: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
