"""The engine: one loaded model that makes videos from prompts, in stages that can be stopped and continued."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.adapters.wan import WanAdapter
from engine.apply import apply_method
from engine.checkpoint import load_run, save_run
from engine.config import RunConfig
from engine.decode import stream_decode, to_uint8
from engine.denoise import SchedulerState, denoise, draw_noise, make_scheduler, scheduler_state
from engine.errors import UserError
from engine.load import find_checkpoint, load_pipeline, pick_device, pick_dtype, read_spec
from engine.progress import enabled, progress_bar
from engine.record import build_record
from engine.trace import Trace
from freespec.kernels import select_kernel


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """What denoising made.

    Attributes:
        latents: [1, z, F, h, w] fp32 on the CPU, normalised as the transformer sees them.
        steps: one dict per step that was run: step, timestep, mode (global, local or dual), seconds.
        seconds: time of the stages `text` and `denoise`.
        resumed_at: steps that an earlier, interrupted run had finished; 0 for a run from noise.
    """

    latents: Tensor
    steps: list[dict[str, Any]]
    seconds: dict[str, float]
    resumed_at: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished video: latents [1, z, F, h, w] fp32, frames uint8 [T, H, W, 3], and the record of the run."""

    latents: Tensor
    frames: np.ndarray
    record: dict[str, Any]


class LongVideoEngine:
    """A model from a configuration, ready to make videos; the method is on the pipeline as long as the engine lives."""

    def __init__(self, config: RunConfig) -> None:
        """Load the checkpoint of `config`. Raises UserError for whatever the user can mend, before weights are read if
        the configuration alone shows it.
        """
        self.config = config
        device = pick_device(config.model.device)
        try:
            select_kernel(config.attention.kernel, device, pick_dtype(config.model.dtype, device))
        except ValueError as error:
            raise UserError(str(error)) from error
        started = time.perf_counter()
        with progress_bar(total=1, desc="load", enabled=enabled(config.output.progress)) as bar:
            self.spec = read_spec(find_checkpoint(config.model.path), config.model.revision)
            self.spec.check_video(config.video.num_frames, config.video.height, config.video.width)
            self.pipe = load_pipeline(config.model)
            bar.update()
        self.handle = apply_method(
            self.pipe,
            method=config.method.method,
            window_frames=config.method.window_frames,
            kernel=config.attention.kernel,
        )
        self.pipe.scheduler = make_scheduler(self.pipe.scheduler, config.sampler.flow_shift)
        self.load_seconds = time.perf_counter() - started

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.pipe._execution_device

    @property
    def loaded(self) -> dict[str, Any]:
        """What was loaded, for the record: checkpoint, revision, dtypes and parameter counts."""
        parts = {name: getattr(self.pipe, name) for name in ("transformer", "vae", "text_encoder")}
        return {
            "path": self.config.model.path,
            "revision": self.config.model.revision,
            "dtype": {name: str(part.dtype).removeprefix("torch.") for name, part in parts.items()},
            "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        }

    def close(self) -> None:
        """Take the method off the pipeline again."""
        self.handle.remove()

    @torch.no_grad()
    def denoise(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        checkpoint: Path | None = None,
        trace: Trace | None = None,
    ) -> Denoised:
        """Latents of one video. What is None is taken from the configuration.

        With `checkpoint`, a run that is interrupted or fails leaves its state there, and the same run continues from
        it; the file of another run is a UserError. It is removed once the last step is done.
        """
        sampler, video = self.config.sampler, self.config.video
        seed = sampler.seed if seed is None else seed
        negative_prompt = sampler.negative_prompt if negative_prompt is None else negative_prompt
        num_frames = video.num_frames if num_frames is None else num_frames
        self.spec.check_video(num_frames, video.height, video.width)

        started = time.perf_counter()
        guided = sampler.guidance_scale > 1.0
        prompts = [prompt, negative_prompt] if guided else [prompt]
        text = WanAdapter.encode_text(self.pipe, prompts, sampler.max_text_tokens, self.device)
        seconds = {"text": time.perf_counter() - started}

        run_id = self._run_id(prompt=prompt, negative_prompt=negative_prompt, seed=seed, num_frames=num_frames)
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(sampler.num_steps, device=self.device)
        scheduler.set_begin_index(0)
        latents, done = self._first_latents(num_frames, seed, checkpoint, run_id)

        started = time.perf_counter()
        loop = _Loop(self, text, trace, checkpoint, run_id)
        latents = loop.run(latents, done)
        seconds["denoise"] = time.perf_counter() - started
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        return Denoised(latents=latents.float().cpu(), steps=loop.steps, seconds=seconds, resumed_at=done)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Frames of latents [1, z, F, h, w], uint8 [t, H, W, 3] at a time: t = 1, then 4 per latent frame (for Wan)."""
        with progress_bar(total=latents.shape[2], desc="decode", enabled=enabled(self.config.output.progress)) as bar:
            for frames in stream_decode(self.pipe.vae, latents):
                yield to_uint8(frames)
                bar.update()

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        seed: int | None = None,
        trace: Trace | None = None,
    ) -> Result:
        """One video in memory: latents, frames and the record. What is None is taken from the configuration."""
        denoised = self.denoise(prompt, negative_prompt=negative_prompt, num_frames=num_frames, seed=seed, trace=trace)
        started = time.perf_counter()
        frames = np.concatenate(list(self.decode(denoised.latents)))
        seconds = {"load": self.load_seconds, **denoised.seconds, "decode": time.perf_counter() - started}
        record = build_record(
            self, prompt=prompt, seed=seed, negative_prompt=negative_prompt, denoised=denoised, seconds=seconds
        )
        return Result(latents=denoised.latents, frames=frames, record=record)

    def _first_latents(self, num_frames: int, seed: int, checkpoint: Path | None, run_id: str) -> tuple[Tensor, int]:
        """Noise and 0, or an interrupted run's latents and the number of its finished steps."""
        if checkpoint is not None and checkpoint.exists():
            return load_run(checkpoint, run_id=run_id, scheduler=self.pipe.scheduler, device=self.device)
        video = self.config.video
        shape = self.spec.latent_shape(num_frames, video.height, video.width)
        return draw_noise(shape, seed).to(self.device), 0

    def _run_id(self, **what: Any) -> str:
        """Hash of all that decides the latents: two runs with the same one have the same latents."""
        tree = dataclasses.asdict(self.config)
        decides = {key: tree[key] for key in ("model", "sampler", "method", "attention")}
        size = {key: tree["video"][key] for key in ("height", "width")}
        text = json.dumps({**decides, **size, **what}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class _Loop:
    """One run of the denoising loop: guidance, progress bar, trace, timing, and the checkpoint of a run that ends early."""

    def __init__(
        self, engine: LongVideoEngine, text: list[Tensor], trace: Trace | None, path: Path | None, run_id: str
    ) -> None:
        self.engine = engine
        self.text = text
        self.trace = trace
        self.path = path
        self.run_id = run_id
        self.steps: list[dict[str, Any]] = []

    def run(self, latents: Tensor, done: int) -> Tensor:
        """Denoise from `done` finished steps on."""
        scheduler = self.engine.pipe.scheduler
        total = len(scheduler.timesteps)
        reached = (done, latents, scheduler_state(scheduler))
        show = enabled(self.engine.config.output.progress)
        with progress_bar(total=total, initial=done, desc="denoise", enabled=show) as bar:
            started = time.perf_counter()

            def after_step(finished: int, latents: Tensor) -> None:
                nonlocal started, reached
                # Reading the clock is honest only once the device has done the step.
                if latents.is_cuda:
                    torch.cuda.synchronize(latents.device)
                mode = self.engine.handle.state.mode
                timestep = float(scheduler.timesteps[finished - 1])
                now = time.perf_counter()
                self.steps.append({"step": finished - 1, "timestep": timestep, "mode": mode, "seconds": now - started})
                started, reached = now, (finished, latents, scheduler_state(scheduler))
                bar.set_postfix(mode=mode)
                bar.update()

            self.engine.handle.state.trace = self.trace
            try:
                return denoise(latents, scheduler, self.predict, start_step=done, after_step=after_step)
            except BaseException:
                self.save(*reached)
                raise
            finally:
                self.engine.handle.state.trace = None

    def predict(self, latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        """Velocity with classifier-free guidance: uncond + scale (cond - uncond), as WanPipeline combines it."""
        pipe = self.engine.pipe
        if self.trace is not None:
            self.trace.enabled = True
        with pipe.transformer.cache_context("cond"):
            cond = WanAdapter.predict(pipe, latents, timestep, self.text[0])
        if len(self.text) == 1:
            return cond
        if self.trace is not None:
            self.trace.enabled = False
        with pipe.transformer.cache_context("uncond"):
            uncond = WanAdapter.predict(pipe, latents, timestep, self.text[1])
        return uncond + self.engine.config.sampler.guidance_scale * (cond - uncond)

    def save(self, done: int, latents: Tensor, state: SchedulerState) -> None:
        """Keep what was computed."""
        if self.path is not None and done > 0:
            save_run(self.path, latents, step=done, run_id=self.run_id, state=state)
