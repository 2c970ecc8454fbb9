"""Read an image as one frame of a video. Imports no torch."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from engine.errors import UserError

# Modes of Pillow that convert to RGB without a choice of colour space.
_MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "PA")


def read_image(path: Path, height: int, width: int) -> np.ndarray:
    """Read an image as uint8 [height, width, 3]: rotated by its EXIF, resized to cover the frame, and cropped to its centre.

    Raises UserError for a file that is not an image, for animations, transparent pixels, and colours other than RGB and gray.
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
