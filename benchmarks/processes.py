"""How many images a second several processes of `tve-hf explain --data-files` explain together; prints JSON.

    python benchmarks/processes.py [--processes 1 2 4] [--num_images 400] [--repeats 3]

Images are noise, and each process has one thread. What starting takes is left out: a rate is that of the images which
the longer of two runs has more than the shorter, one of an eighth as many. Numbers of processes take turns.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image


def noise(number: int, path: Path) -> None:
    """Write a parquet file of JPEG images of 340 x 256 pixels."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(number):
        encoded = BytesIO()
        Image.fromarray(generator.integers(0, 256, (256, 340, 3), np.uint8)).save(encoded, "JPEG")
        rows.append({"bytes": encoded.getvalue(), "path": None})
    Dataset.from_dict({"image": rows}).to_parquet(path)


def seconds(processes: int, number: int, folder: Path) -> float:
    """Explain a file of so many images, and time all of it."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    command += ["-m", "tve_hf", "explain", "--data-files", str(folder / f"{number}.parquet"), "--quiet"]
    # As many shards for each process in both runs, whatever their number.
    command += ["--output", str(folder / "out"), "--shard-size", str(max(1, number // 32))]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    taken = time.perf_counter() - start
    shutil.rmtree(folder / "out")
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num_images", type=int, default=400, help="of the longer run")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    few, many = args.num_images // 8, args.num_images
    rates: dict[int, list[float]] = {number: [] for number in args.processes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in (few, many):
            noise(number, folder / f"{number}.parquet")
        for _, processes in itertools.product(range(args.repeats), args.processes):
            short, long = (seconds(processes, number, folder) for number in (few, many))
            rates[processes].append((many - few) / (long - short))
    found = {str(number): [round(rate, 2) for rate in values] for number, values in rates.items()}
    medians = {number: round(statistics.median(values), 2) for number, values in found.items()}
    print(json.dumps({"cores": os.cpu_count(), "num_images": many, "rates": found, "median": medians}, indent=1))


if __name__ == "__main__":
    main()
