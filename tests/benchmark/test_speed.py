"""What is measured of actions whose cost is known."""

import itertools

import torch
from torch import nn

from tve_hf.benchmark import speed
from tve_hf.benchmark.cost import LiveMemory
from tve_hf.benchmark.speed import Action, measure, table_of


def test_times_are_compared_round_by_round(monkeypatch) -> None:
    clock, taken = itertools.count(), []
    now = [0.0]

    def work(name: str, seconds: float):
        def run(pixel_values: torch.Tensor) -> torch.Tensor:
            taken.append(name)
            now[0] += seconds * (1 + next(clock) % 2)  # the machine is busy every other time
            return pixel_values @ pixel_values.new_ones(4, 5)

        return run

    monkeypatch.setattr(speed, "perf_counter", lambda: now[0])
    actions = {"prediction": Action(work("prediction", 1.0), []), "other": Action(work("other", 3.0), [], scale=10)}
    rows = {row["name"]: row for row in measure(actions, torch.ones(2, 4), repeats=4)}
    assert taken[-8:] == ["prediction", "other", "other", "prediction"] * 2
    ratios = [o / p for o, p in zip(rows["other"]["all_seconds"], rows["prediction"]["all_seconds"], strict=True)]
    assert rows["other"]["ratio"] == torch.tensor(ratios, dtype=torch.float64).median().item()
    assert rows["prediction"]["ratio"] == 1 and rows["prediction"]["interval"] == (1, 1)
    assert sorted(set(ratios)) == [15, 60] and rows["other"]["interval"] == (15, 60)
    assert rows["prediction"]["gflops"] == 2 * 4 * 5 / 1e9  # of one image
    assert rows["other"]["gflops"] == 10 * rows["prediction"]["gflops"]


def test_memory_is_that_of_weights_and_of_tensors_that_live_at_once() -> None:
    layer = nn.Linear(8, 16, bias=False)

    def run(rows: torch.Tensor) -> torch.Tensor:
        wide = layer(rows)  # 3 x 16
        wide = wide.relu()  # 3 x 16 more, while the other lives
        return wide.sum(1)

    with torch.no_grad():
        rows = measure({"prediction": Action(run, [layer, layer])}, torch.ones(3, 8), repeats=2)
    assert rows[0]["memory_mb"] * 2**20 == 4 * (8 * 16 + 2 * 3 * 16)


def test_live_memory_forgets_what_is_freed() -> None:
    given = torch.ones(100)
    with LiveMemory() as memory:
        one = given + 1
        del one
        other = given * 2
        assert memory.now == memory.peak == 400
        view = other[:50]
    assert memory.peak == 400 and len(view) == 50


def test_the_table_tells_what_was_scaled_and_what_refused() -> None:
    row = {"seconds": 0.5, "ratio": 2.0, "interval": (1.5, 2.5), "gflops": 3.0, "memory_mb": 7.0}
    entry = {
        "classifier": "tiny",
        "batch_size": 2,
        "rows": [row | {"name": "prediction", "scale": 1.0}, row | {"name": "rise@4000", "scale": 200.0}],
        "refused": {"legrad": "tiny has no attention"},
    }
    lines = table_of({"device": "cpu", "dtype": "float32", "measured": [entry]}).splitlines()
    assert "| prediction | 250.00 | 2.000 | 1.500 to 2.500 | 3.00 | 7 |" in lines
    assert any(line.startswith("| rise@4000 * |") for line in lines)
    assert "| legrad | refused: tiny has no attention | | | | |" in lines
    assert lines[-1].startswith("\\* measured on 20 samples")
