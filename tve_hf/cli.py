"""The command line: tve-hf explain | info | pretrain | evaluate | card | push.

Each command also reads arguments from files, one a line: `tve-hf pretrain @recipe.args --classifier ...`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .files import dumps
from .files import write_whole as _write
from .messages import REPORT, is_expected, message, sentence, verified

_AT_SIGN = "@"  # before the name of a file of arguments


def _parser(command: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """A parser for a command, whose docstring is the description."""
    return argparse.ArgumentParser(
        f"tve-hf {command.__name__}", description=command.__doc__, fromfile_prefix_chars=_AT_SIGN
    )


def _settings(command: Callable[[list[str]], int], kind: type, arguments: list[str]) -> Any:
    """Parse the arguments of a command into its dataclass of settings."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kind, prog=f"tve-hf {command.__name__}", fromfile_prefix_chars=_AT_SIGN)
    return parser.parse_args_into_dataclasses(arguments)[0]


def _default_photograph() -> Any:
    try:
        from skimage import data
    except ImportError:
        raise ValueError(
            "No image was given, and the example photograph of scikit-image is not installed; "
            "pass an image, or run `pip install tve_hf[demo]`."
        ) from None
    return data.chelsea()  # a cat, CC0


def _stem(image: str, taken: set[str]) -> str:
    """A file name for an image's results, different from those already taken."""
    # Names end at 255 bytes, with room for the endings; case makes no difference on some systems.
    base = Path(image.split("?")[0].rstrip("/")).stem[:50] or "image"
    name, number = base, 2
    while name.lower() in taken:
        name, number = f"{base}-{number}", number + 1
    taken.add(name.lower())
    return name


def explain(arguments: list[str]) -> int:
    """Explain images: one overlay for each class and one JSON with the raw maps for each image."""
    parser = _parser(explain)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="path or URL; an example photograph if none")
    parser.add_argument("--classifier", help="name or folder of an image classifier; the shipped one by default")
    parser.add_argument("--model", help="name or folder of an explainer of its backbone; the shipped one by default")
    parser.add_argument("--label", action="append", help="explain this class instead of the predicted one; repeatable")
    parser.add_argument(
        "--candidate-labels", nargs="+", metavar="LABEL", help="classes of a zero-shot classifier, such as CLIP"
    )
    parser.add_argument(
        "--hypothesis-template",
        nargs="+",
        metavar="TEXT",
        help='what they are put in; default "This is a photo of {}."',
    )
    parser.add_argument("--top-k", type=int, help="explain the k most probable classes")
    parser.add_argument("--verify", type=int, metavar="N", help="compare with N random patches, or masked passes")
    parser.add_argument("--refine", type=int, metavar="N", help="correct the map by N masked passes")
    parser.add_argument("--output", type=Path, default=Path("explanations"), metavar="DIR", help="where results go")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each image instead of text")
    args = parser.parse_args(arguments)

    from tqdm.auto import tqdm
    from transformers.utils import logging

    from .compatibility import quality_in_words

    logging.disable_progress_bar()
    asked = {
        "label": args.label,
        "top_k": args.top_k,
        "verify": args.verify,
        "refine": args.refine,
        "candidate_labels": args.candidate_labels,
        "hypothesis_template": args.hypothesis_template,
    }
    images: list[tuple[str, Any]] = [(image, image) for image in args.images]
    if not images:
        images = [("chelsea.png", _default_photograph())]
    start = time.perf_counter()
    explainer = _pipeline(args.model, args.classifier, {k: v for k, v in asked.items() if v is not None})
    args.output.mkdir(parents=True, exist_ok=True)

    if not args.json:
        print(quality_in_words(explainer.quality))
    failed = 0
    taken: set[str] = set()
    for name, image in tqdm(images, unit="image", disable=len(images) == 1 or not sys.stderr.isatty()):
        try:
            record = _save(name, explainer(image), args.output, _stem(name, taken))
        except Exception as error:  # whatever is wrong with one image, the others are still explained
            failed += 1
            tqdm.write(message(error, name), file=sys.stderr)
            continue
        if args.json:
            tqdm.write(dumps(record))
            continue
        for result in record["explanations"]:
            tqdm.write(
                f"{name}: {result['label']} ({result['score']:.1%}) -> {result['overlay']} [rule {result['rule']}]"
            )
            if "verification" in result:
                tqdm.write(verified(result))
    if not args.json:
        work = time.perf_counter() - start
        print(f"{len(images) - failed} of {len(images)} images in {work:.2f} s, loading the models included")
    return 1 if failed else 0


def _pipeline(model: str | None, classifier: str | None, options: dict[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import pipeline

    from . import DEFAULT_EXPLAINER, TVEExplainer

    name = model or str(DEFAULT_EXPLAINER)
    try:
        # Loaded here, since `pipeline` puts a traceback into the message of what goes wrong.
        explainer = TVEExplainer.from_pretrained(name)
        return pipeline("transferable-attribution", model=explainer, classifier=classifier, **options)
    except (RuntimeError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise  # of the device, say: transformers names that option where weights do not fit their config
        folders = " or ".join(filter(None, (name, classifier)))
        raise ValueError(
            f"{folders} cannot be loaded; check its files or fetch it again: {sentence(error)}"
        ) from error


def _save(image: str, results: list[dict[str, Any]], folder: Path, stem: str) -> dict[str, Any]:
    """Write the overlays of one image and, last, its JSON; return what that says."""
    record: dict[str, Any] = {"image": image, "explanations": []}
    for rank, result in enumerate(results, 1):
        path = folder / (f"{stem}.png" if len(results) == 1 else f"{stem}.{rank}.png")
        _write(path, result["overlay"].save)
        numbers = {key: result[key] for key in result if key not in ("heatmap", "overlay", "figure")}
        record["explanations"].append(numbers | {"attribution": result["attribution"].tolist(), "overlay": str(path)})
    _write(folder / f"{stem}.json", partial(Path.write_text, data=dumps(record) + "\n"))
    return record


def info(arguments: list[str]) -> int:
    """Say what a classifier is, how it splits, and which explainers fit it."""
    parser = _parser(info)
    parser.add_argument("classifier", help="name or folder of an image classifier")
    parser.add_argument(
        "--explainers", nargs="+", metavar="NAME", help="folders or repositories to try; the released ones by default"
    )
    parser.add_argument("--author", help="also try the explainers of this user or organisation of the Hub")
    parser.add_argument("--collection", metavar="SLUG", help="also try the models of this collection of the Hub")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(arguments)

    from transformers.utils import logging

    from .hub.info import describe, explainers_in, explainers_of, text_of
    from .released import EXPLAINERS

    logging.disable_progress_bar()
    names = args.explainers or ([] if args.author or args.collection else [*EXPLAINERS])
    names += explainers_of(args.author) if args.author else []
    names += explainers_in(args.collection) if args.collection else []
    description = describe(args.classifier, names)
    print(dumps(description, indent=1) if args.json else text_of(description))
    return 0


def pretrain(arguments: list[str]) -> int:
    """Pre-train an explainer for a classifier's backbone on unlabelled images."""
    from .pretrain import PretrainArguments
    from .pretrain import pretrain as run

    run(_settings(pretrain, PretrainArguments, arguments))
    return 0


def evaluate(arguments: list[str]) -> int:
    """Measure an explainer on held-out images: agreement with exact, and fidelity beside other methods."""
    from .benchmark.run import EvaluateArguments
    from .benchmark.run import evaluate as run
    from .evaluation.report import table_of

    print(table_of(run(_settings(evaluate, EvaluateArguments, arguments))))
    return 0


_LICENSE = "of the weights, by its name on the Hub, such as apache-2.0"


def card(arguments: list[str]) -> int:
    """Render a checkpoint's model card from its config, training log and evaluation reports."""
    from .hub.model_card import render_card

    parser = _parser(card)
    parser.add_argument("folder", type=Path, help="checkpoint folder with config.json and training.json")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="folders that tve-hf evaluate wrote")
    parser.add_argument("--license", help=_LICENSE)
    parser.add_argument("--output", type=Path, required=True, help="where the card goes")
    args = parser.parse_args(arguments)
    _write(args.output, render_card(args.folder, args.results, license=args.license).save)
    return 0


def push(arguments: list[str]) -> int:
    """Push a checkpoint, its code and its card to the Hub in one commit; without --yes only say what would be sent."""
    parser = _parser(push)
    parser.add_argument("folder", type=Path, help="checkpoint folder with config.json and training.json")
    parser.add_argument("repo_id", metavar="REPO_ID", help="repository to create or update, such as owner/name")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="folders that tve-hf evaluate wrote")
    parser.add_argument(
        "--unmeasured", action="store_true", help="push an explainer without results; its card says so"
    )
    parser.add_argument("--card", type=Path, help="card to push if it says what the results say; rendered by default")
    parser.add_argument("--license", help=f"{_LICENSE}; that of the card by default")
    parser.add_argument("--private", action="store_true", default=None, help="create a private repository")
    parser.add_argument("--branch", help="branch to commit to, created where it does not exist; main by default")
    parser.add_argument("--yes", action="store_true", help="do send it")
    args = parser.parse_args(arguments)

    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    from .hub.push import prepare

    logging.disable_progress_bar()
    prepared = prepare(
        args.folder,
        args.repo_id,
        args.results,
        args.card,
        args.private,
        args.branch,
        measured=not args.unmeasured,
        license=args.license,
    )
    print(prepared)
    if not args.yes:
        print("Nothing was sent; add --yes to send it.")
        return 0
    if not sys.stderr.isatty():
        disable_progress_bars()
    print(prepared.send().commit_url)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "explain": explain,
    "info": info,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "card": card,
    "push": push,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake ends with one sentence and exit code 1, one of ours with its traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        helped = arguments[:1] in (["-h"], ["--help"])
        stream = sys.stdout if helped else sys.stderr
        print("usage: tve-hf COMMAND ...\n", file=stream)
        for name, command in COMMANDS.items():
            print(f"  {name:10} {(command.__doc__ or '').splitlines()[0]}", file=stream)
        if arguments and not helped:
            print(f"\ntve-hf: {arguments[0]!r} is not a command; choose one of the above.", file=stream)
        return 0 if helped else 2
    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except Exception as error:  # told apart below, and raised again unless input can bring it about
        if not is_expected(error):
            error.add_note(REPORT)
            raise
        print(message(error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
