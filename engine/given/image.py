"""A picture as one frame of a video. Imports no torch."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from engine.errors import UserError

# What Pillow calls pictures whose colours need no choice of ours.
_MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "PA")


def read_image(path: Path, height: int, width: int) -> np.ndarray:
    """A picture as uint8 [height, width, 3]: turned as its EXIF says, resized until it covers the frame, and cropped to its middle.

    UserError for a file that is no picture, an animation, transparent pixels, and colours that are neither RGB nor gray.
    """
    try:
        with Image.open(path) as image:
            num_frames = getattr(image, "n_frames", 1)
            if num_frames > 1:
                raise UserError(f"{path} has {num_frames} frames; give one picture, or a video to --extend")
            if image.mode not in _MODES:
                raise UserError(f"{path} has the colours {image.mode}; convert it to RGB with 8 bits first")
            image.load()
            whole = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"cannot read the picture {path}: {reason}") from error
    rgba = whole.convert("RGBA")
    if np.asarray(rgba.getchannel("A")).min() < 255:
        raise UserError(f"{path} has transparent pixels; put it on a background first")
    return np.asarray(ImageOps.fit(rgba.convert("RGB"), (width, height), Image.Resampling.LANCZOS))
