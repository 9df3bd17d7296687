"""tve-hf info, card and push."""

import sys
from pathlib import Path

from ..files import dumps, write_whole
from .parser import parser_of


def info(arguments: list[str]) -> int:
    """Say what a classifier is, how it splits, and which explainers fit it."""
    parser = parser_of(info)
    parser.add_argument("classifier", help="name or folder of an image classifier")
    parser.add_argument(
        "--explainers", nargs="+", metavar="NAME", help="folders or repositories to try; the released ones by default"
    )
    parser.add_argument("--author", help="also try the explainers of this user or organisation of the Hub")
    parser.add_argument("--collection", metavar="SLUG", help="also try the models of this collection of the Hub")
    parser.add_argument(
        "--search", metavar="WORD", help="only name the classes that have this word, with their numbers"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(arguments)

    from transformers.utils import logging

    from ..hub.info import classes_with, describe, explainers_in, explainers_of, text_of
    from ..released import EXPLAINERS

    logging.disable_progress_bar()
    if args.search is not None:
        found = classes_with(args.search, args.classifier)
        classes = [{"class_idx": index, "label": label} for index, label in found.items()]
        print(
            dumps(classes, indent=1)
            if args.json
            else "\n".join(f"{index:6} {label}" for index, label in found.items())
        )
        return 0
    names = args.explainers or ([] if args.author or args.collection else [*EXPLAINERS])
    names += explainers_of(args.author) if args.author else []
    names += explainers_in(args.collection) if args.collection else []
    description = describe(args.classifier, names)
    print(dumps(description, indent=1) if args.json else text_of(description))
    return 0


_LICENSE = "of the weights, by its name on the Hub, such as apache-2.0"


def card(arguments: list[str]) -> int:
    """Render a checkpoint's model card from its config, training log and evaluation reports."""
    parser = parser_of(card)
    parser.add_argument("folder", type=Path, help="checkpoint folder with config.json and training.json")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="folders that tve-hf evaluate wrote")
    parser.add_argument("--license", help=_LICENSE)
    parser.add_argument("--output", type=Path, required=True, help="where the card goes")
    args = parser.parse_args(arguments)

    from ..hub.model_card import render_card

    write_whole(args.output, render_card(args.folder, args.results, license=args.license).save)
    return 0


def push(arguments: list[str]) -> int:
    """Push a checkpoint, its code and its card to the Hub in one commit; without --yes only say what would be sent."""
    parser = parser_of(push)
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

    from ..hub.push import prepare

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
