"""What does `import tve_hf` cost beside the parts of transformers that it builds on?

Starts fresh processes in turn, one that imports AutoModel, PreTrainedModel and Pipeline of transformers, and one that
imports the package (and with it those), each of which times its own import. Prints the medians and their ratio as
JSON; the first of each warms the disk's cache and does not count.

    python benchmarks/import_time.py --repeats 15
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {"transformers": "from transformers import AutoModel, Pipeline, PreTrainedModel", "tve_hf": "import tve_hf"}


def seconds(statement: str) -> float:
    """Seconds that an import takes in a process of its own, which `python` itself has started before."""
    code = f"import time; began = time.perf_counter(); {statement}; print(time.perf_counter() - began)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    rounds = [{name: seconds(statement) for name, statement in IMPORTS.items()} for _ in range(args.repeats + 1)][1:]
    medians = {name: statistics.median(one[name] for one in rounds) for name in IMPORTS}
    report = {f"{name}_seconds": round(value, 4) for name, value in medians.items()}
    report |= {"ratio": round(medians["tve_hf"] / medians["transformers"], 4), "repeats": args.repeats}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
