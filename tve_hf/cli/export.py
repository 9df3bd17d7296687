"""tve-hf export."""

from pathlib import Path

from .models import load_pipeline, without_warnings
from .parser import parser_of


def export(arguments: list[str]) -> int:
    """Write a classifier and its explainer as one graph that needs neither this package nor, as ONNX, torch."""
    parser = parser_of(export)
    parser.add_argument("--classifier", help="name or folder of an image classifier; that of the explainer by default")
    parser.add_argument("--model", help="name or folder of an explainer of its backbone; one that fits by default")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="model.onnx or model.pt2")
    parser.add_argument("--format", choices=("onnx", "pt2"), help="ONNX or torch.export; as FILE is named by default")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the models; as they are saved by default"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="explain the K most probable classes; default 1")
    parser.add_argument(
        "--candidate-labels", nargs="+", metavar="LABEL", help="classes of a zero-shot classifier, such as CLIP"
    )
    parser.add_argument("--push-to-hub", action="store_true", help="upload it beside the weights of the explainer")
    parser.add_argument(
        "--hub-model-id", metavar="REPO_ID", help="repository to upload to; that of --model by default"
    )
    args = parser.parse_args(arguments)

    from transformers.utils import logging

    from ..export import export as run
    from ..export.push import check_repository, push

    logging.disable_progress_bar()
    repo_id = args.hub_model_id or args.model
    if args.push_to_hub and repo_id is None:
        raise ValueError("--push-to-hub needs a repository; name one by --hub-model-id.")
    if args.push_to_hub:  # before the work
        repo_id = check_repository(repo_id)
    options = {} if args.candidate_labels is None else {"candidate_labels": args.candidate_labels}
    explain = load_pipeline(args.model, args.classifier, "cpu", args.dtype, options)
    with without_warnings("torch.onnx"):
        written = run(explain, args.output, args.format, args.top_k)
    size = sum(path.stat().st_size for path in written.files)
    print(f"{args.output}: {size:,} bytes, differs from the pipeline by at most {written.difference:.1g}")
    if args.push_to_hub:
        print(push(written.files, repo_id).commit_url)
    return 0
