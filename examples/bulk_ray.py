"""The rows of `tve-hf explain --data-files` on a cluster of Ray, for users whose images outgrow one machine.

    pip install 'tve_hf[train,ray]'
    python examples/bulk_ray.py s3://bucket/photos maps --workers 8 --gpus 1

Ray reads the files, of any storage that it knows, spreads them over the workers of its cluster, and starts anew what a
killed worker had begun. An image that cannot be read becomes a row with its error, so the files are read undecoded.
Unlike `tve-hf explain`, a run that was killed as a whole starts from the beginning, in an empty folder.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import pipeline

from tve_hf.bulk.ahead import num_workers
from tve_hf.bulk.card import render
from tve_hf.bulk.run import explained, prepared_batches
from tve_hf.bulk.shards import DATA, FEATURES
from tve_hf.bulk.work import Row


class ExplainBatch:
    """Turn a batch of files, {"bytes", "path"}, into rows of maps; each worker loads the models once."""

    def __init__(self, **models: Any):
        self.explainer = pipeline("transferable-attribution", **models)
        self.pool = ThreadPoolExecutor(num_workers())

    def __call__(self, files: pa.Table) -> pa.Table:
        rows = [Row((0, 0), file["path"], file) for file in files.to_pylist()]
        batches = prepared_batches(self.pool, self.explainer, rows, len(rows))
        records = [record for batch in batches for _, found in explained(self.explainer, batch) for record in found]
        return pa.Table.from_pylist(records, schema=FEATURES.arrow_schema)


def main(arguments: list[str] | None = None) -> None:
    """Explain all images below a folder into parquet files and a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder of images, local or of a storage that Ray reads")
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--classifier", help="name or folder; the shipped one by default")
    parser.add_argument("--model", help="explainer of its backbone; one that fits by default")
    parser.add_argument("--workers", type=int, default=1, help="each takes a core; Ray needs another to read files")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args(arguments)
    if args.output.exists() and any(args.output.iterdir()):
        parser.error(f"{args.output} is not empty; name a new folder")
    import ray

    models = {name: value for name in ("classifier", "model") if (value := getattr(args, name)) is not None}
    files = ray.data.read_binary_files(args.images, include_paths=True)
    maps = files.map_batches(
        ExplainBatch,
        fn_constructor_kwargs=models,
        batch_size=args.batch_size,
        batch_format="pyarrow",
        concurrency=args.workers,
        num_gpus=args.gpus,
    )
    maps.write_parquet(os.path.abspath(args.output / DATA))
    settings = {"classifier": "the shipped one", "explainer": "one that fits", "method": "tve"} | models
    (args.output / "README.md").write_text(render(args.output, settings | {"source": args.images}, None))


if __name__ == "__main__":
    main()
