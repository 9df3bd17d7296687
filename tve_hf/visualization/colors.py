"""The colours of signed maps: blue speaks against the class, red for it, and the less it says the paler it is.

Told apart in every form of colour blindness, since they differ in blue against yellow as well as in red against green.
"""

import numpy as np

# Anchors in OKLab (lightness, green to red, blue to yellow; https://bottosson.github.io/posts/oklab/), in which equal
# steps look equal: deep blue, blue, almost white, orange, red.
_ANCHORS = np.array(
    [(0.42, -0.02, -0.20), (0.66, -0.05, -0.14), (0.97, 0.0, 0.0), (0.70, 0.11, 0.11), (0.54, 0.18, 0.11)]
)
STEPS = 255  # an odd number, so that one is zero
ZERO = STEPS // 2


def _to_rgb(oklab: np.ndarray) -> np.ndarray:
    """OKLab (..., 3) -> sRGB (..., 3), uint8."""
    to_cones = np.array(
        [(1, 0.3963377774, 0.2158037573), (1, -0.1055613458, -0.0638541728), (1, -0.0894841775, -1.291485548)]
    )
    to_linear = np.array(
        [
            (4.0767416621, -3.3077115913, 0.2309699292),
            (-1.2684380046, 2.6097574011, -0.3413193965),
            (-0.0041960863, -0.7034186147, 1.707614701),
        ]
    )
    linear = ((oklab @ to_cones.T) ** 3 @ to_linear.T).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def _steps() -> np.ndarray:
    positions, anchors = np.linspace(0, 1, STEPS), np.linspace(0, 1, len(_ANCHORS))
    return _to_rgb(np.stack([np.interp(positions, anchors, channel) for channel in _ANCHORS.T], -1))


PALETTE = _steps()  # (STEPS, 3)
