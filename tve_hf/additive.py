"""The additive form of meta-attributions over random backgrounds: what Eq. 3 makes of them, and back.

An embedding with only the patches in S kept is taken for a sum over the patches,

    G(S) ~ base + sum over z of (1[z in S] - p) phi_z,        phi_z in R^D, p = P(z in S).

Where patches are kept independently of each other, the means over backgrounds are then

    kept_z = E[G(S) | z in S] = base + (1 - p) phi_z        removed_z = E[G(S) | z not in S] = base - p phi_z.

Where they are kept together, phi is the coefficient of least squares, and the same formulas say what z alone changes.
For a linear head w_y the score w_y . phi_z is the Banzhaf value of the class's logit (p = 1/2), or its Shapley value
(Shapley kernel, efficiency).

Shapes: B images, K coalitions of each, N patches, D = embedding_dim.
"""

import torch
from torch import Tensor


def kept_and_removed(phi: Tensor, base: Tensor, prob: float) -> tuple[Tensor, Tensor]:
    """Return kept and removed, (B, N, D) each, float32, of phi (B, N, D) and base (B, D).

    float32 whatever they come in: phi is the difference of the two, and small beside them.
    """
    phi, base = phi.float(), base.float().unsqueeze(1)
    return base + (1 - prob) * phi, base - prob * phi


def phi_and_base(kept: Tensor, removed: Tensor, prob: float) -> tuple[Tensor, Tensor]:
    """Return phi (B, N, D) and base (B, D), float32, of kept and removed: the inverse of `kept_and_removed`."""
    kept, removed = kept.float(), removed.float()
    return kept - removed, (prob * kept + (1 - prob) * removed).mean(1)


def embedding_of(coalitions: Tensor, phi: Tensor, base: Tensor, prob: float) -> Tensor:
    """Predict G(S) of coalitions (B, K, N), boolean, from phi (B, N, D) and base (B, D): (B, K, D), float32."""
    with torch.autocast(phi.device.type, enabled=False):
        return base.float().unsqueeze(1) + (coalitions.float() - prob) @ phi.float()


def efficient(phi: Tensor, empty: Tensor, full: Tensor, prob: float) -> tuple[Tensor, Tensor]:
    """Let patches share out all of G(x) - G(empty image): sum over z of phi_z, as Shapley values do.

    What is missing goes to all patches alike. The base follows, since S = nothing and S = everything are then exact.

    Args:
        phi: (B, N, D).
        empty: G of the empty image, (D,) or (B, D).
        full: G(x), (B, D).

    Returns:
        phi (B, N, D) and base (B, D), float32.
    """
    phi, total = phi.float(), full.float() - empty.float()
    phi = phi + ((total - phi.sum(1)) / phi.shape[1]).unsqueeze(1)
    return phi, empty.float() + prob * total
