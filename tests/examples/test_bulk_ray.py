"""The example on Ray, with two workers of which one is killed in the middle: every image has its row."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny import GRID, noise_image

ROOT = Path(__file__).resolve().parents[2]
NUMBER = 12
# Ray starts the class in its workers, so the kill has to come with it: the first batch that any of them takes.
DRIVER = """
import os
import signal
from pathlib import Path

import bulk_ray
import ray


class Mortal(bulk_ray.ExplainBatch):
    def __call__(self, files):
        try:
            Path(os.environ["KILLED"]).touch(exist_ok=False)
        except FileExistsError:
            return super().__call__(files)
        os.kill(os.getpid(), signal.SIGKILL)


bulk_ray.ExplainBatch = Mortal
ray.init(num_cpus=4, include_dashboard=False)
bulk_ray.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; `pip install tve_hf[ray]`")
def test_rows_of_a_run_in_which_a_worker_was_killed(pair, tmp_path, isolated):
    (tmp_path / "photos").mkdir()
    for seed in range(NUMBER):
        noise_image(seed).save(tmp_path / "photos" / f"{seed:02}.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, tmp_path / "driver.py", tmp_path / "photos", tmp_path / "maps", "--workers", 2]
    command += ["--batch_size", 2, "--classifier", pair[0], "--model", pair[1]]
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "KILLED": str(tmp_path / "killed")}
    own |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"}
    done = subprocess.run([*map(str, command)], env=os.environ | own, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    found = datasets.load_dataset(str(tmp_path / "maps"), split="train")
    *rows, bad = sorted(found, key=lambda row: row["image"])
    assert [Path(row["image"]).name for row in rows] == [f"{seed:02}.png" for seed in range(NUMBER)]
    assert all(row["id"] == row["image"] and np.shape(row["map"]) == (GRID, GRID) for row in rows)
    assert bad["map"] is None and "bad.png" in bad["error"]
