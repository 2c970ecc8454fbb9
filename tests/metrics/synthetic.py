"""Videos whose measures are known without measuring: translation, stills, blur, loops."""

import numpy as np

SIZE = 64


def texture(seed: int = 0) -> np.ndarray:
    """A smooth random picture on the torus, float [SIZE, SIZE, 3], about 128 +- 45 levels."""
    noise = np.random.default_rng(seed).normal(size=(SIZE, SIZE, 3))
    y, x = np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE), indexing="ij")
    smooth = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) * np.exp(-200 * (x**2 + y**2))[..., None], axes=(0, 1)).real
    return 128 + 45 * smooth / smooth.std()


def moved(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    """The picture moved by (x, y) pixels on the torus, exactly, by the shift theorem."""
    fy, fx = np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE), indexing="ij")
    phase = np.exp(-2j * np.pi * (fx * x + fy * y))[..., None]
    return np.fft.ifft2(np.fft.fft2(picture, axes=(0, 1)) * phase, axes=(0, 1)).real


def video(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures as frames uint8 [T, SIZE, SIZE, 3]."""
    return np.clip(np.rint(np.stack(pictures)), 0, 255).astype(np.uint8)


def translation(num_frames: int, x: float, y: float, seed: int = 0) -> np.ndarray:
    """A texture that moves by (x, y) pixels in every frame."""
    picture = texture(seed)
    return video([moved(picture, x * t, y * t) for t in range(num_frames)])


def still(num_frames: int, seed: int = 0) -> np.ndarray:
    """A texture that does not move."""
    return video([texture(seed)] * num_frames)
