"""What splitting a classifier costs, side by side with the classifier itself, in one run on one machine.

    python benchmarks/overhead.py [FOLDER ...] [--repeats 30] [--batch_size 8]

measures the classifier in the package and those in the folders given, and prints JSON. Everything is a ratio to one
plain pass `model(pixel_values)` of the same batch; the rounds take turns, so that a busy moment hits all alike:

- `forward`: `classifier(pixel_values)`, which adds embeddings and feature maps; `embed`: `classifier.embed`;
- `split`: `split_classifier(model)`, two passes over two images of noise;
- `fingerprint`, `fingerprint_full`: of the backbone's weights, once for each time that a model is loaded.

`passes` counts the passes of the model and of its head in each.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tve_hf

SHIPPED = Path(tve_hf.__file__).parent / "checkpoints" / "vit-tiny-tiny-imagenet"


@torch.no_grad()
def overhead(name: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """Median seconds and quartiles of every action of one classifier, as ratios to a plain pass, and its passes."""
    classifier = tve_hf.split_classifier(name, dtype=torch.float32)
    model, processor = classifier.backbone.model, classifier.image_processor
    shape = (batch_size, *classifier.probe().shape[1:])
    pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    actions: dict[str, Callable[[], Any]] = {
        "model": lambda: model(pixel_values),
        "forward": lambda: classifier(pixel_values),
        "embed": lambda: classifier.embed(pixel_values),
        "split": lambda: tve_hf.split_classifier(model, processor),
        "fingerprint": classifier.fingerprint,
        "fingerprint_full": lambda: classifier.fingerprint(full=True),
    }

    passes: dict[str, dict[str, int]] = {}
    for action, run in actions.items():  # and warm up
        counts = passes[action] = {"model": 0, "head": 0}

        def count(part: str, counts: dict[str, int] = counts) -> Callable[..., None]:
            def add(*_: Any) -> None:
                counts[part] += 1

            return add

        modules = {"model": model, "head": model.get_submodule(classifier.backbone.head_names[0])}
        handles = [module.register_forward_hook(count(part)) for part, module in modules.items()]
        run()
        for handle in handles:
            handle.remove()

    seconds: dict[str, list[float]] = {action: [] for action in actions}
    for i in range(repeats):
        order = list(actions) if i % 2 == 0 else list(reversed(actions))
        for action in order:
            start = time.perf_counter()
            actions[action]()
            seconds[action].append(time.perf_counter() - start)
    ratios = {
        action: [taken / plain for taken, plain in zip(seconds[action], seconds["model"], strict=True)]
        for action in actions
        if action != "model"
    }
    return {
        "classifier": Path(name).name,
        "images": list(shape),
        "model_milliseconds": round(1000 * statistics.median(seconds["model"]), 3),
        "ratio": {action: round(statistics.median(values), 4) for action, values in ratios.items()},
        "quartiles": {
            action: [round(q, 4) for q in statistics.quantiles(values, n=4)[::2]] for action, values in ratios.items()
        },
        "passes": passes,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="more classifiers to measure: names or folders")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2, or there are no quartiles")
    found = [overhead(name, args.batch_size, args.repeats) for name in (str(SHIPPED), *args.folders)]
    settings = {"repeats": args.repeats, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"settings": settings, "classifiers": found}, indent=1))


if __name__ == "__main__":
    main()
