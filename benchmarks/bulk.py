"""How fast `tve-hf explain` goes through many images, side by side with the model calls that it cannot do without.

    python benchmarks/bulk.py IMAGES [--classifier NAME --model NAME] [--num_images 2000] [--repeats 3]

reads a folder of images, or parquet files, and prints JSON. In each round all ways take turns on the same images, with
the models loaded before, and each is compared with the others of its round:

- `predict`: the classifier's bare calls on batches that the bulk's loader decodes and processes ahead;
- `model`: the same, with the explainer and the transfer: maps that nobody keeps;
- `bulk`: the whole of `tve-hf explain --data-files`, with its shards;
- `pipeline`: the pipeline called on lists of a batch;
- `plain` and `pictures`: `tve-hf explain FOLDER`, with pictures without text and with figures; for folders alone.

`bulk_of_model` is what bulk keeps of the images a second of bare calls; `plain_of_pipeline` and `pictures_of_pipeline`
what pictures leave of the pipeline's. `cpu_milliseconds` of an image, over all threads, bound what the cores can do,
and are less disturbed by other processes.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tve_hf.bulk.ahead import num_workers
from tve_hf.bulk.run import explain_rows, prepared_batches, results_of
from tve_hf.bulk.shards import Folder
from tve_hf.bulk.work import Row, Work
from tve_hf.cli.allocator import keep_freed_memory
from tve_hf.cli.explain import PictureRun
from tve_hf.cli.explain import explain as command
from tve_hf.cli.models import load_pipeline
from tve_hf.cli.options import options_of
from tve_hf.sources import Images, open_images, read_image


def ways_of(explainer: Any, images: Images, files: list[str], batch_size: int) -> dict[str, Callable[[Path], Any]]:
    """What is timed: each takes a new folder to write in."""
    work = Work(images, 1000)

    def batches(pool: ThreadPoolExecutor) -> Iterator[list[dict[str, Any]]]:
        for batch in prepared_batches(pool, explainer, work.rows(()), batch_size):
            yield [inputs for _, inputs in batch if isinstance(inputs, dict)]

    def with_loader(call: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], Any]:
        def run(_: Path) -> None:
            with ThreadPoolExecutor(num_workers() + 1) as pool:
                for prepared in batches(pool):
                    call(prepared)

        return run

    @torch.inference_mode()
    def predict(prepared: list[dict[str, Any]]) -> None:
        pixel_values = torch.cat([inputs["pixel_values"] for inputs in prepared]).to(explainer.device)
        explainer.classifier.backbone.model(pixel_values)

    def bulk(folder: Path) -> None:
        for _ in explain_rows(explainer, work, Folder(folder, {}, ""), {}, batch_size):
            pass

    def pipeline(_: Path) -> None:
        rows: Iterator[Row] = work.rows(())
        while batch := [read_image(row.image) for row in itertools.islice(rows, batch_size)]:
            explainer(batch, batch_size=batch_size)

    def pictures(*more: str) -> Callable[[Path], Any]:
        def run(folder: Path) -> None:
            arguments = [*files, "--output", str(folder), "--batch-size", str(batch_size), "--quiet", *more]
            PictureRun(options_of(command).parse_args(arguments)).go(explainer)

        return run

    ways = {
        "predict": with_loader(predict),
        "model": with_loader(lambda prepared: results_of(explainer, prepared)),
        "bulk": bulk,
        "pipeline": pipeline,
    }
    return ways | ({"plain": pictures("--plain"), "pictures": pictures()} if files else {})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="a folder of images, or parquet files")
    parser.add_argument("--classifier")
    parser.add_argument("--model")
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    keep_freed_memory()  # as the command does, for all ways
    explainer = load_pipeline(args.model, args.classifier, None, None, {})
    found = open_images(args.images)
    data: Any = found.data
    numbers = [i % len(data) for i in range(args.num_images)]  # more than there are: again from the first
    images = found._replace(data=data.select(numbers), number=args.num_images)
    paths = [data[i][found.column]["path"] for i in numbers] if Path(args.images[0]).is_dir() else []
    ways = ways_of(explainer, images, list(dict.fromkeys(paths)), args.batch_size)
    sizes = {way: len(set(paths)) if way in ("plain", "pictures") else args.num_images for way in ways}

    rates: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(args.repeats + 1):  # the first warms up
        for way in ways if repeat % 2 else reversed(ways):
            with tempfile.TemporaryDirectory() as folder:
                wall, busy = time.perf_counter(), time.process_time()
                ways[way](Path(folder) / "out")
                wall, busy = time.perf_counter() - wall, time.process_time() - busy
            if repeat:
                rates[way].append(sizes[way] / wall)
                cpu[way].append(1000 * busy / sizes[way])

    def ratio(one: str, other: str) -> dict[str, float]:
        each = [a / b for a, b in zip(rates[one], rates[other], strict=True)]
        return {"median": round(statistics.median(each), 3), "lowest": round(min(each), 3)}

    pairs = [("bulk", "model"), ("bulk", "predict"), ("plain", "pipeline"), ("pictures", "pipeline")]
    report = {
        "images": sizes,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "cores": num_workers(),
        "torch": torch.__version__,
        "images_per_second": {way: round(statistics.median(values), 2) for way, values in rates.items()},
        "cpu_milliseconds": {way: round(statistics.median(values), 2) for way, values in cpu.items()},
    }
    print(json.dumps(report | {f"{a}_of_{b}": ratio(a, b) for a, b in pairs if a in rates}, indent=1))


if __name__ == "__main__":
    main()
