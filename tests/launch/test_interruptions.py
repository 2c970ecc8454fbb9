"""Ctrl-C and SIGTERM in each stage: one line, no partial file, and what was computed is kept and gives the same video."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from torch import nn

from engine.decode.decoder import VideoDecoder
from engine.engine import LongVideoEngine
from engine.files.latents import load_latents
from tests.launch.conftest import LTX, SMALL, Run
from tests.launch.test_generate import names

ROOT = Path(__file__).parent.parent.parent


@contextmanager
def interrupted_at_forward(number: int, which: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """A signal arrives when the transformer has done this many forwards."""
    count = 0

    def after(module: nn.Module, args: tuple, output: object) -> None:
        nonlocal count
        # A forward on the meta device is one that the planner counts.
        is_model = isinstance(module, WanTransformer3DModel | LTXVideoTransformer3DModel)
        if is_model and not next(module.parameters()).is_meta:
            count += 1
            if count == number:
                signal.raise_signal(which)

    handle = nn.modules.module.register_module_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def test_while_loading_nothing_is_left(
    make: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.engine.load_pipeline", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    assert make() == Run(130, "", "stopped\n")
    assert names(tmp_path) == set()


def test_before_the_first_step_is_done_nothing_is_left(make: Callable[..., Run], tmp_path: Path) -> None:
    with interrupted_at_forward(1):
        shown = make()
    assert shown.code == 130
    assert "before the first step was finished" in shown.stopped
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("hangup")
# Wan takes two forwards a step (guidance): in the middle of its third step, and in the second of LTX-Video's.
@pytest.mark.parametrize(
    ("which", "code", "model", "forwards", "done_steps"),
    [
        (signal.SIGINT, 130, {}, 5, 2),
        (signal.SIGTERM, 143, {}, 5, 2),
        (signal.SIGHUP, 129, {}, 5, 2),
        (signal.SIGINT, 130, LTX, 2, 1),
    ],
    ids=["interrupted", "terminated", "hung-up", "interrupted-ltx"],
)
def test_while_denoising_the_same_command_continues_to_the_same_bits(  # noqa: PLR0917
    make: Callable[..., Run],
    tmp_path: Path,
    which: signal.Signals,
    code: int,
    model: dict[str, object],
    forwards: int,
    done_steps: int,
) -> None:
    whole, parts = (
        model | {"output.path": tmp_path / f"{name}.mp4", "output.save_latents": tmp_path / f"{name}.safetensors"}
        for name in ("whole", "parts")
    )
    assert make(whole).code == 0
    done = names(tmp_path)
    with interrupted_at_forward(forwards, which):
        shown = make(parts)
    assert shown.code == code
    assert f"after step {done_steps}" in shown.stopped
    assert f"{tmp_path / 'parts.snapshot.safetensors'}; the same command continues" in shown.stopped
    assert names(tmp_path) == done | {"parts.snapshot.safetensors"}

    # Another prompt or seed is no continuation of it, and does not touch it.
    assert "parts.snapshot.safetensors" in make(parts | {"sampler.seed": 1}).error
    assert names(tmp_path) == done | {"parts.snapshot.safetensors"}

    shown = make(parts)
    assert shown.code == 0
    assert f"(continued after step {done_steps})" in shown.out
    assert names(tmp_path) == done | {name.replace("whole", "parts") for name in done}
    latents = [load_latents(tmp_path / f"{name}.safetensors")[0] for name in ("whole", "parts")]
    assert torch.equal(*latents)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "parts.mp4").read_bytes()


@pytest.mark.parametrize(("model", "piece"), [({}, 2), (LTX, 0)], ids=["wan", "ltx"])  # frames come in pieces
def test_while_decoding_the_latents_are_kept(  # noqa: PLR0917
    make: Callable[..., Run],
    run: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, object],
    piece: int,
) -> None:
    whole = VideoDecoder.decode

    def stop_midway(self: VideoDecoder, latents: torch.Tensor, *, seed: int) -> Iterator[np.ndarray]:
        for i, frames in enumerate(whole(self, latents, seed=seed)):
            yield frames
            if i == piece:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(VideoDecoder, "decode", stop_midway)
        shown = make(model)
    assert shown.code == 130
    assert shown.stopped.startswith("while decoding; the latents are kept in ")
    assert names(tmp_path) == {"a.latents.safetensors"}
    assert "the same command continues from them, or make the video with: " in shown.stopped

    command = shlex.split(shown.stopped.partition("make the video with: ")[2])
    assert run("decode", *(tmp_path / "b.mp4" if word.endswith("a.mp4") else word for word in command[2:])).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(LongVideoEngine, "denoise", lambda *_, **__: pytest.fail("denoised again"))
        assert make(model).code == 0
    assert names(tmp_path) == {f"{name}.{kind}" for name in "ab" for kind in ("mp4", "png", "json")}
    assert make(model | {"output.path": tmp_path / "whole.mp4"}).code == 0
    for name in "ab":
        for kind in ("mp4", "png"):
            assert (tmp_path / f"{name}.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()


def test_while_the_latents_are_written_they_are_kept(
    make: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_engine, calls = sys.modules["engine.files.latents"].save_latents, []

    def stop_first(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        from_engine(*args, **kwargs)

    monkeypatch.setattr("engine.produce.save_latents", stop_first)
    shown = make()
    assert shown.code == 130
    assert "the latents are kept in" in shown.stopped
    assert names(tmp_path) == {"a.latents.safetensors", "a.snapshot.safetensors"}
    assert make().code == 0
    assert names(tmp_path) == {"a.mp4", "a.png", "a.json"}


def test_a_process_that_is_interrupted_says_so_in_one_line_and_continues(
    make: Callable[..., Run], wan_folder: Path, tmp_path: Path
) -> None:
    """The whole way: another process, a signal from outside, the exit code that a shell sees. That the bits are the same is seen above."""
    settings = SMALL | {"model.path": wan_folder, "sampler.num_steps": 120}
    target = {"output.path": tmp_path / "a.mp4", "output.save_latents": tmp_path / "a.safetensors"}
    command = [sys.executable, str(ROOT / "launch/generate.py"), "--prompt", "a red circle"]
    command += [f"--{key}={value}" for key, value in (settings | target).items()]
    process = subprocess.Popen(
        [*command, "--output.progress=on"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    shown = b""
    while b" 2/120" not in shown:
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, shown.decode()
        shown += piece
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=200)
    assert (process.returncode, out) == (130, b"")
    assert rest.decode().splitlines()[-1].startswith("stopped: after step ")
    assert b"Traceback" not in shown + rest
    assert names(tmp_path) == {"a.snapshot.safetensors"}

    shown = make(settings | target)
    assert "(continued after step " in shown.out
    assert names(tmp_path) == {"a.mp4", "a.png", "a.json", "a.safetensors"}
