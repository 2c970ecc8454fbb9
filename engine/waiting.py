"""Waiting for a GPU without keeping signals from Python."""

import time

import torch

POLL_SECONDS = 0.001


def wait_for(device: torch.device) -> None:
    """Return once the device has done what is queued on its current stream; at once for a CPU.

    `torch.cuda.synchronize` waits in C, where Ctrl-C and SIGTERM are heard only when it returns: after a step of minutes. Here
    Python looks at an event again and again, and a signal is handled between two looks.
    """
    if device.type != "cuda":
        return
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    while not done.query():
        time.sleep(POLL_SECONDS)
