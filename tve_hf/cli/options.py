"""The options of tve-hf explain."""

import argparse
from collections.abc import Callable
from pathlib import Path

from .parser import parser_of

_BATCH_SIZE = 16
# Arguments of the pipeline, which it checks and describes.
PIPELINE_OPTIONS = (
    *("label", "class_idx", "top_k", "rule", "method", "verify", "refine"),
    *("candidate_labels", "hypothesis_template"),
)


def options_of(command: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = parser_of(command)
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="path, URL, folder or quoted pattern such as 'photos/**/*.jpg'; - for an image on standard input; an "
        "example photograph if none",
    )
    parser.add_argument(
        "--images-from",
        action="append",
        default=[],
        metavar="FILE",
        help="also explain what this file lists, one IMAGE a line; - for a list on standard input",
    )
    parser.add_argument("--classifier", help="name or folder of an image classifier; the shipped one by default")
    parser.add_argument(
        "--model",
        help="name or folder of an explainer of its backbone; one that fits by default. A folder that tve-hf pretrain "
        "wrote knows its classifier",
    )
    parser.add_argument("--method", metavar="NAME", help="explain by this method, such as grad_cam; needs no --model")
    parser.add_argument("--label", action="append", help="explain this class instead of the predicted one; repeatable")
    parser.add_argument(
        "--class-idx", action="append", type=int, metavar="N", help="explain the class of this number; repeatable"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="explain the k most probable classes")
    parser.add_argument(
        "--candidate-labels", nargs="+", metavar="LABEL", help="classes of a zero-shot classifier, such as CLIP"
    )
    parser.add_argument(
        "--hypothesis-template",
        nargs="+",
        metavar="TEXT",
        help='what they are put in; default "This is a photo of {}."',
    )
    parser.add_argument("--rule", metavar="NAME", help="how embeddings become scores; the explainer's by default")
    parser.add_argument("--verify", type=int, metavar="N", help="compare with N random patches, or masked passes")
    parser.add_argument("--refine", type=int, metavar="N", help="correct the map by N masked passes")
    parser.add_argument("--device", help="where to compute: cpu, cuda, cuda:1, mps, or the number of a GPU")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the models; as they are saved by default"
    )
    parser.add_argument(
        "--batch-size", type=int, default=_BATCH_SIZE, metavar="N", help=f"images at a time; default {_BATCH_SIZE}"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("explanations"),
        metavar="DIR",
        help="where photo.tve.png and photo.tve.json go, or the shards of a data set; default explanations",
    )
    parser.add_argument("--plain", action="store_true", help="pictures without any text, of the photograph's size")
    parser.add_argument("--blocky", action="store_true", help="draw each patch as a block, not smoothed")
    parser.add_argument("--full-size", action="store_true", help="draw large photographs in full, not reduced")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each image instead of text")
    parser.add_argument("--quiet", action="store_true", help="print errors alone, and JSON if asked for")
    parser.add_argument(
        "--dataset-name",
        metavar="NAME",
        help="instead of images: explain a whole data set of the Hub, or a folder of one, into parquet shards in "
        "--output, without pictures; killed at any moment, the same command goes on",
    )
    parser.add_argument("--dataset-config", metavar="NAME", help="configuration of the data set")
    parser.add_argument("--split", default="train", metavar="NAME", help="split of the data set; default train")
    parser.add_argument(
        "--data-files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="or files: parquet, arrow, tar (webdataset) or images, patterns of one kind, or folders of images",
    )
    parser.add_argument(
        "--image-column", metavar="NAME", help="column of the images; found where there is one or it is called image"
    )
    parser.add_argument("--streaming", action="store_true", help="read a data set in passing, without a copy on disk")
    parser.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="images of a shard, at most; default 1000"
    )
    return parser
