"""Random changes of a picture's colours as one affine map of each pixel, so that worker and device make the same.

    out = clamp(M (r, g, b) + t, 0, 255),   M = b c S H,   t = 127.5 (1 - c)

b brightness, c contrast about mid grey, S saturation (a blend with the luma of ITU-R BT.601, which is all of a grey
picture), H a rotation of the hue (in the plane of I and Q, where luma stays). torchvision's ColorJitter has the same
parameters but moves contrast about each picture's own mean, and hue in HSV; NVIDIA DALI's ColorTwist is of this form.
"""

import math

import numpy as np

from vlscale.sections import AugmentConfig

NUM_DRAWS = 5  # brightness, contrast, saturation, hue, grey
_MID_GREY = 127.5
_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_RGB = np.linalg.inv(_YIQ)


def colour_map(augment: AugmentConfig, draws: np.ndarray) -> np.ndarray | None:
    """(3, 4) float32, (M | t) in levels of 0 to 255; None where `augment` leaves colours as they are. `draws`
    (NUM_DRAWS,) in [0, 1) decides everything."""
    if not (augment.brightness or augment.contrast or augment.saturation or augment.hue or augment.grayscale):
        return None
    signed = 2 * draws - 1
    contrast = 1 + augment.contrast * signed[1]
    saturation = 0.0 if draws[4] < augment.grayscale else 1 + augment.saturation * signed[2]
    matrix = _saturated(saturation) @ _turned(2 * math.pi * augment.hue * signed[3])
    matrix *= (1 + augment.brightness * signed[0]) * contrast
    return np.column_stack([matrix, np.full(3, _MID_GREY * (1 - contrast))]).astype(np.float32)


def _saturated(factor: float) -> np.ndarray:
    return factor * np.eye(3) + (1 - factor) * np.tile(_LUMA, (3, 1))


def _turned(angle: float) -> np.ndarray:
    cosine, sine = math.cos(angle), math.sin(angle)
    return _RGB @ np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) @ _YIQ
