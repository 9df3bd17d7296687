"""Where the time of a pre-training step goes, and whether memory stays flat; prints one JSON.

    python benchmarks/pretrain_profile.py --classifier google/vit-base-patch16-224 --train_files 'images/*.parquet' \
        --output_dir /tmp/profile --max_steps 200

takes the arguments of `tve-hf pretrain`. `share` holds the shares of the time between the first and the last step:
masked passes of the backbone, waiting for data, the rest of the step (one unmasked pass, the explainer, its gradients
and the optimiser), and what is outside of steps (validations, checkpoints). `memory_mb` is the resident memory of the
training process at five moments of the second half of the run, without the pages of mapped files (the images, which
the system takes back when it likes); `growth_mb` is what a straight line through all its steps gains there, and
`peak_rss_mb` the maximum with those pages. `tflops` is what the model's operations, counted in the first step, come to
in a second, `matmul_tflops` the rate of a large matrix product in the same precision, and `utilisation` their ratio.
"""

import json
import resource
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser

from tve_hf import pretrain as module
from tve_hf.pretrain import PretrainArguments

PAGE_MB = resource.getpagesize() / 2**20


def own_mb() -> float:
    """Resident memory of this process that is not a mapped file (Linux)."""
    resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - of_files) * PAGE_MB


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, counted as two for each product and sum."""
    device, side = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        start = now()
        matrix @ matrix
        seconds.append(now() - start)
    return 2 * side**3 / float(np.median(seconds))


def now() -> float:
    """Seconds; work on a GPU is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Profile:
    """Seconds of each part of a run, the operations of its first step, and the memory after each."""

    def __init__(self) -> None:
        self.operations = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.ends: list[float] = []
        self.memory: list[float] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time is counted."""

        def stand_in(*arguments: Any, **options: Any) -> Any:
            start = now()
            result = function(*arguments, **options)
            if self.ends:  # the first step pays for memory and kernels that later ones reuse
                self.seconds[name] += now() - start
            return result

        return stand_in

    def end_of_step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, after which time and memory are noted."""

        def stand_in(*arguments: Any, **options: Any) -> Any:
            with nullcontext() if self.ends else FlopCounterMode(display=False) as counter:
                result = function(*arguments, **options)
            if counter is not None:
                self.operations = counter.get_total_flops()
            self.ends.append(now())
            self.memory.append(own_mb())
            return result

        return stand_in

    def batches_of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same context manager, the waiting for whose batches is counted."""

        @contextmanager
        def stand_in(*arguments: Any) -> Iterator[Iterator[Any]]:
            with function(*arguments) as stream:
                pull = self.timed("data", stream.__next__)
                yield iter(pull, None)

        return stand_in

    def report(self, images_per_step: int, dtype: torch.dtype) -> dict[str, Any]:
        """Shares, rates and memory; `dtype` is that of the backbone."""
        whole = self.ends[-1] - self.ends[0]
        masked, data, step = (self.seconds[name] for name in ("masked", "data", "step"))
        parts = {"masked_passes": masked, "data": data, "explainer": step - masked, "between": whole - data - step}
        half = np.array(self.memory[len(self.memory) // 2 :])
        slope = np.polyfit(np.arange(len(half)), half, 1)[0] if len(half) > 1 else 0.0
        rate, best = self.operations * (len(self.ends) - 1) / whole, matmul_rate(dtype)
        moments = np.linspace(0, len(half) - 1, 5).astype(int)
        return {
            "steps": len(self.ends),
            "images_per_second": round((len(self.ends) - 1) * images_per_step / whole, 2),
            "share": {name: round(seconds / whole, 3) for name, seconds in parts.items()},
            "tflops": round(rate / 1e12, 4),
            "matmul_tflops": round(best / 1e12, 4),
            "utilisation": round(rate / best, 3),
            "memory_mb": half[moments].round(1).tolist(),
            "growth_mb": round(float(slope) * len(half), 2),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if torch.cuda.is_available() else None,
        }


def main() -> None:
    (args,) = HfArgumentParser(PretrainArguments).parse_args_into_dataclasses()
    profile = Profile()
    module.exact_labels = profile.timed("masked", module.exact_labels)
    module._Run.step = profile.end_of_step(profile.timed("step", module._Run.step))
    module.batches_of = profile.batches_of(module.batches_of)
    module.pretrain(args)
    command = shlex.join(["python", *sys.argv])
    dtype = module.HALF.get(args.mixed_precision, torch.float32)
    report = profile.report(args.batch_size * args.gradient_accumulation_steps, dtype)
    print(json.dumps({"command": command} | report))


if __name__ == "__main__":
    main()
