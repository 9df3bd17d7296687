"""What a removed pixel is replaced with.

An operator maps (pixel_values, keep) to fills: images (B, C, H, W) and boolean masks of their kept pixels, (B or 1, K,
1, H, W), to values that broadcast to (B, K, C, H, W), of which only those at removed pixels are used. It is applied to
pixels as the image processor normalises them. No operator looks at other images of the batch, and none is random, so
an image's masked copies are the same in every batch.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Removal = Callable[[Tensor, Tensor], Tensor]


def zero(pixel_values: Tensor, keep: Tensor) -> Tensor:
    """The papers': 0 in normalised space, about the mean pixel of the data set that the processor is made for."""
    return pixel_values.new_zeros(())


def mean(pixel_values: Tensor, keep: Tensor) -> Tensor:
    """The mean colour of the image itself."""
    return pixel_values.mean((2, 3), keepdim=True).unsqueeze(1)


def constant(color: Sequence[float]) -> Removal:
    """Make an operator of one colour, such as a data set's mean, a value for each channel in normalised space.

    `patches.REMOVALS["dataset_mean"] = constant(color)` makes it known by a name.
    """

    def fill(pixel_values: Tensor, keep: Tensor) -> Tensor:
        return pixel_values.new_tensor(color).view(-1, 1, 1)

    return fill


def blur(pixel_values: Tensor, keep: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation of a tenth of the shorter side; the border is extended."""
    sigma = min(pixel_values.shape[-2:]) / 10
    radius = int(2 * sigma)
    offset = torch.arange(-radius, radius + 1, device=pixel_values.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = kernel / kernel.sum()
    channels = pixel_values.shape[1]
    # In float32: for bfloat16 with channels last, torch takes minutes on a CPU.
    x = F.pad(pixel_values.float(), (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
    x = F.conv2d(x, kernel.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
    return x.to(pixel_values.dtype).unsqueeze(1)


def _neighbors(x: Tensor) -> Tensor:
    """Sum over the 8 neighbours of each pixel of (..., H, W), weighted 1/6, and 1/12 on the diagonals.

    Sums of shifted copies, not a convolution, which GPUs round to TF32.
    """
    total = x
    for dim in (-1, -2):
        n = x.shape[dim] - 1
        part, total = total, 2 * total
        total.narrow(dim, 1, n).add_(part.narrow(dim, 0, n))
        total.narrow(dim, 0, n).add_(part.narrow(dim, 1, n))
    return (total - 4 * x) / 12


def road(pixel_values: Tensor, keep: Tensor) -> Tensor:
    """Noisy linear imputation (ROAD, Rong et al., arXiv 2202.00449): the mask cannot be seen in what it leaves.

    Every removed pixel is the weighted mean of its neighbours in the image, 1/6 for direct and 1/12 for diagonal ones,
    plus normal noise of standard deviation 0.01 in normalised space, always the same. Where nothing is kept, the fill
    is 0 plus noise. The sparse systems of all masks and channels are solved at once, by a few hundred steps of
    conjugate gradients on the pixels: the error is far below the noise, the cost above that of a small classifier.
    """
    images = pixel_values.float().unsqueeze(1)  # (B, 1, C, H, W)
    kept = keep.float()
    removed = 1 - kept
    weights = _neighbors(torch.ones_like(images[0, 0, 0]))  # (H, W), less than 1 at the border

    def product(x: Tensor) -> Tensor:  # symmetric, positive definite where at least one pixel is kept
        return removed * (weights * x - _neighbors(x))

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum((-2, -1), keepdim=True)

    colors = dot(images, kept) / kept.sum((-2, -1), keepdim=True).clamp(min=1)  # (B, K, C, 1, 1)
    fill = removed * colors
    known = removed * _neighbors(images * kept)
    residual = known - product(fill)
    direction, size = residual.clone(), dot(residual, residual)
    enough = 1e-12 * dot(known, known).amax(2, keepdim=True)
    for step in range(10 * sum(pixel_values.shape[-2:])):
        # Asking whether it is done makes a GPU wait.
        if step % 10 == 0 and bool((size <= enough).all()):
            break
        image = product(direction)
        length = size / dot(direction, image).clamp(min=1e-30)
        fill.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        before, size = size, dot(residual, residual)
        direction.mul_(size / before.clamp(min=1e-30)).add_(residual)
    noise = torch.randn(images.shape[2:], generator=torch.Generator().manual_seed(0)).to(images.device)
    return (fill + 0.01 * noise).to(pixel_values.dtype)
