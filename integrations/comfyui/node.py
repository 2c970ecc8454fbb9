"""The node: a prompt, and perhaps a first frame, to a video that a FreeSpec service makes."""

import io
import json
import time
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
from comfy_api.latest import InputImpl
from PIL import Image

from .client import ADDRESS, ADDRESS_VARIABLE, KEY_VARIABLE, AwayError, Service, ServiceError

POLL_SECONDS = 0.5
# A service that was killed loads its model again, and goes on with its jobs.
AWAY_SECONDS = 600.0


class FreeSpecVideo:
    """Asks a FreeSpec service for a video, and waits for it."""

    CATEGORY = "FreeSpec"
    DESCRIPTION = "A long video from a prompt or a timeline, made by a FreeSpec service (serve.py)."
    FUNCTION = "make"
    RETURN_TYPES = ("VIDEO", "IMAGE")
    RETURN_NAMES = ("video", "frames")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the name that ComfyUI calls
        """The inputs; what is empty or 0 is left to the service."""
        key = f"empty: ${KEY_VARIABLE}, for the address in ${ADDRESS_VARIABLE} alone; a key typed here is saved with the workflow"
        return {
            "required": {
                "prompt": (
                    "STRING",
                    {"multiline": True, "tooltip": "a text, or a timeline: a red circle [0-4s] | a yellow star [4s-]"},
                ),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
                "seconds": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 3600.0, "step": 0.1, "tooltip": "0: the service's"},
                ),
            },
            "optional": {
                "first_frame": ("IMAGE",),
                "method": ("STRING", {"default": "", "tooltip": "freespec, direct, ...; empty: the service's"}),
                "size": ("STRING", {"default": "", "tooltip": "such as 832x480; empty: the service's"}),
                "extra": ("STRING", {"default": "", "tooltip": 'such as {"sampler.num_steps": 20}; empty: none'}),
                "address": ("STRING", {"default": "", "tooltip": f"empty: ${ADDRESS_VARIABLE}, or {ADDRESS}"}),
                "api_key": ("STRING", {"default": "", "tooltip": key}),
            },
        }

    def make(  # noqa: PLR0913 - one for each input, by its name
        self,
        *,
        prompt: str,
        seed: int,
        seconds: float,
        first_frame: Any = None,
        method: str = "",
        size: str = "",
        extra: str = "",
        address: str = "",
        api_key: str = "",
    ) -> tuple[Any, Any]:
        """Make the video; returns it, and its frames."""
        texts = {"method": method.strip(), "size": size.strip(), "extra": extra.strip()}
        if seconds:
            texts["seconds"] = f"{seconds:.6f}".rstrip("0").rstrip(".")
        fields = {"prompt": prompt, "seed": str(seed), **{name: text for name, text in texts.items() if text}}
        if "extra" in fields:
            try:
                json.loads(fields["extra"])
            except ValueError as error:
                raise ServiceError(f"extra is not JSON: {error}") from error
        service = Service.of(address, api_key)
        picture = None if first_frame is None else as_png(first_frame)
        job = patiently(lambda: service.create(fields, picture))
        name = job["id"]
        bar = comfy.utils.ProgressBar(100)
        while job["status"] in ("queued", "in_progress"):
            bar.update_absolute(job["progress"])
            wait(POLL_SECONDS, service, name)
            job = patiently(lambda: service.show(name), service, name)
        if job["status"] != "completed":
            raise ServiceError(f"the video failed: {job['message']}")
        bar.update_absolute(100)
        data = patiently(lambda: service.content(name), service, name)
        video = InputImpl.VideoFromFile(io.BytesIO(data))
        return video, video.get_components().images


def patiently(ask: Any, service: Service | None = None, name: str | None = None) -> Any:
    """Ask again while the service is away, or has no room; the last error after `AWAY_SECONDS`."""
    until = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return ask()
        except AwayError as error:
            if time.monotonic() > until:
                raise
            wait(min(error.wait, 30.0), service, name)


def wait(seconds: float, service: Service | None, name: str | None) -> None:
    """Wait; if a person interrupts, cancel the job, and end as ComfyUI wants it."""
    until = time.monotonic() + seconds
    while True:
        try:
            comfy.model_management.throw_exception_if_processing_interrupted()
        except BaseException:
            if service is not None and name is not None:
                cancel(service, name)
            raise
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, 0.1))


def cancel(service: Service, name: str) -> None:
    """Cancel a job; one that cannot be reached any more stays."""
    try:
        service.delete(name)
    except ServiceError:
        return


def as_png(image: Any) -> bytes:
    """The first picture of an IMAGE, [B, H, W, C] in [0, 1], as PNG."""
    pixels = np.clip(255.0 * image[0].cpu().numpy()[..., :3], 0, 255).round().astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()
