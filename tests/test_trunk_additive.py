"""The additive form against brute-force means over all coalitions."""

import itertools

import pytest
import torch

from tve_hf.trunk_backbone import efficient, embedding_of, kept_and_removed, phi_and_base

PATCHES, DIM = 5, 3


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("prob", [0.5, 0.2])
def test_kept_and_removed_are_conditional_means_over_all_coalitions(prob) -> None:
    phi, base = drawn(2, PATCHES, DIM), drawn(2, DIM)
    sets = torch.tensor(list(itertools.product([False, True], repeat=PATCHES)))
    chance = torch.where(sets, prob, 1 - prob).prod(1)  # of each set, patches independent
    embeddings = embedding_of(sets.expand(2, -1, -1), phi, base, prob)  # (2, 32, D)
    kept, removed = kept_and_removed(phi, base, prob)
    for z in range(PATCHES):
        for with_z, found in ((sets[:, z], kept), (~sets[:, z], removed)):
            weights = chance * with_z
            expected = (weights[:, None] * embeddings).sum(1) / weights.sum()
            torch.testing.assert_close(found[:, z], expected)
    torch.testing.assert_close((chance[:, None] * embeddings).sum(1), base)  # the mean over all


def test_the_inverse() -> None:
    phi, base = drawn(2, PATCHES, DIM), drawn(2, DIM)
    for found, expected in zip(phi_and_base(*kept_and_removed(phi, base, 0.3), 0.3), (phi, base), strict=True):
        torch.testing.assert_close(found, expected)


def test_efficient_shares_add_up_and_differences_stay() -> None:
    phi, empty, full = drawn(2, PATCHES, DIM), drawn(DIM), drawn(2, DIM)
    shared, base = efficient(phi, empty, full, 0.5)
    torch.testing.assert_close(shared.sum(1), full - empty)
    torch.testing.assert_close(shared[:, 1:] - shared[:, :1], phi[:, 1:] - phi[:, :1])
    ends = torch.tensor([[False] * PATCHES, [True] * PATCHES]).expand(2, -1, -1)
    expected = torch.stack([empty.expand(2, -1), full], 1)
    torch.testing.assert_close(embedding_of(ends, shared, base, 0.5), expected)


def test_half_precision_does_not_swallow_small_phi() -> None:
    phi, base = 1e-3 * drawn(1, PATCHES, DIM), 100 + drawn(1, DIM)
    kept, removed = kept_and_removed(phi.bfloat16(), base.bfloat16(), 0.5)
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept - removed, phi.bfloat16().float(), atol=1e-5, rtol=0)
