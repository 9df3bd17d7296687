"""The summary of an evaluation, by hand."""

import torch

from tve_hf.evaluation.report import summarize, table_of


def test_the_share_of_exact_stands_beside_the_methods():
    gaps = {"tve": [0.3, 0.1], "exact": [0.4, 0.4], "centre": [0.1, 0.0]}
    table = {f"{spec}/zero/plus": torch.tensor(values).double() for spec, values in gaps.items()}
    table |= {f"{spec}/zero/minus": torch.zeros(2).double() for spec in gaps}
    summary = summarize(table, list(gaps), ["zero"])
    assert set(summary["fidelity"]["zero"]) == set(gaps)
    assert summary["tve_share_of_exact"] == {"zero": 0.5}
    assert "tve_share_of_exact" not in summarize(table, ["exact", "centre"], ["zero"])
    cost = dict.fromkeys(gaps, {"seconds": 0.0, "forward": 1.0, "backward": 0.0})
    lines = table_of({"num_images": 2, "summary": summary, "cost": cost}).splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| exact", "| tve", "| centre"]
