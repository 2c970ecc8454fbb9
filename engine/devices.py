"""Devices and dtypes by the names of settings, and waiting for a GPU without blocking signals."""

import time

import torch

from engine.errors import UserError

POLL_SECONDS = 0.001


def pick_device(name: str) -> torch.device:
    """The device of a `model.device` setting."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "model.device is cuda, but torch sees no CUDA device; use cpu, or a torch built for your driver"
        )
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a `model.dtype` setting: `auto` is bfloat16 on CUDA and float32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def wait_for(device: torch.device) -> None:
    """Return once the device has finished the work on its current stream; at once for a CPU.

    `torch.cuda.synchronize` waits in C, where Ctrl-C and SIGTERM are handled only when it returns, after a step of minutes.
    This polls an event from Python, which handles signals between two polls.
    """
    if device.type != "cuda":
        return
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    while not done.query():
        time.sleep(POLL_SECONDS)
