"""The benchmark of what splitting costs runs, and counts passes; times are for people to read."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_overhead_benchmark_runs_and_counts_passes() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "overhead.py"
    command = [sys.executable, str(script), "--repeats", "2", "--batch_size", "1"]
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)["classifiers"]
    assert found["classifier"] == "vit-tiny-tiny-imagenet"
    assert set(found["ratio"]) == {"forward", "embed", "split", "fingerprint", "fingerprint_full"}
    assert found["passes"]["forward"] == found["passes"]["model"] == {"model": 1, "head": 1}
    assert found["passes"]["split"] == {
        "model": 2,
        "head": 3,
    }  # it checks that the head gives the second pass's logits
    assert found["passes"]["fingerprint_full"] == {"model": 0, "head": 0}
