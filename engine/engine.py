"""The engine: one loaded model that makes videos from prompts, in stages that can be stopped and continued."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from torch import Tensor
from tqdm import tqdm

from engine.adapters.wan import WanAdapter, WanSpec
from engine.apply import MethodHandle, Ranks, apply_method
from engine.checkpoint import load_run, save_run
from engine.config import MethodConfig, OutputConfig, RunConfig
from engine.decode_plan import check_tiles
from engine.decoder import VideoDecoder
from engine.denoise import SchedulerState, denoise, draw_noise, make_scheduler, scheduler_state
from engine.errors import UserError
from engine.group_of_one import GROUP_OF_ONE
from engine.load import fetch, find_checkpoint, load_pipeline, pick_device, pick_dtype, read_spec
from engine.progress import enabled, progress_bar
from engine.ranks import check_agreement, fingerprints, hand_out, hand_out_bytes, together
from engine.record import build_record
from engine.trace import Trace
from freespec.kernels import select_kernel
from parallel.mesh import SeqMesh


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
    """A finished video: latents [1, z, F, h, w] fp32, frames uint8 [T, H, W, 3] (none but on rank 0), and the record."""

    latents: Tensor
    frames: np.ndarray
    record: dict[str, Any]


class LongVideoEngine:
    """A model from a configuration, ready to make videos; the method is on the pipeline as long as the engine lives."""

    def __init__(self, config: RunConfig, ranks: Ranks | None = None) -> None:
        """Load the checkpoint of `config`; with `ranks`, every rank makes its engine from the same configuration.

        Raises UserError, on all ranks together, for whatever the user can mend, before weights are read if the
        configuration alone shows it.
        """
        self.config = config
        self.device = pick_device(config.model.device)
        self._alone = ranks is None
        self.ranks = ranks or Ranks(mesh=GROUP_OF_ONE.acquire(), why="one process")
        started = time.perf_counter()
        try:
            with self.progress("load", total=1) as bar:
                self.spec, self._prints = together(self.mesh, self._check)
                check_agreement(self.mesh, self._prints)
                self.pipe = together(self.mesh, self._load)
                bar.update()
            self.decoder = VideoDecoder(
                config, vae=self.pipe.vae, spec=self.spec, device=self.device, world=self.mesh.world
            )
            self.handle = self._apply_method()
            self.pipe.scheduler = make_scheduler(self.pipe.scheduler, config.sampler.flow_shift)
        except BaseException:
            self._release_group()
            raise
        self.load_seconds = time.perf_counter() - started

    def use_method(self, method: MethodConfig, output: OutputConfig | None = None) -> None:
        """Take the method off the loaded model and put another one on; `output` is where its video goes, if elsewhere."""
        self.handle.remove()
        self.config = replace(self.config, method=method, output=output or self.config.output)
        self.handle = self._apply_method()

    @property
    def mesh(self) -> SeqMesh:
        """The ranks that share the video."""
        return self.ranks.mesh

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which encodes the text, shows progress and writes files."""
        return self.mesh.world.rank == 0

    @property
    def decode_plan(self) -> dict[str, Any] | None:
        """Who decodes what, for the record; None before `decode` is called."""
        return self.decoder.decode_plan

    def progress(self, stage: str, *, total: int, initial: int = 0) -> tqdm:
        """A bar of a stage, on rank 0 and where `output.progress` asks for it."""
        show = self.is_first and enabled(self.config.output.progress)
        return progress_bar(total=total, initial=initial, desc=stage, enabled=show)

    @property
    def loaded(self) -> dict[str, Any]:
        """What was loaded, for the record: checkpoint, revision, dtypes and parameter counts."""
        named = {name: getattr(self.pipe, name) for name in ("transformer", "vae", "text_encoder")}
        parts = {name: part for name, part in named.items() if part is not None}
        return {
            "path": self.config.model.path,
            "revision": self.config.model.revision,
            "dtype": {name: str(part.dtype).removeprefix("torch.") for name, part in parts.items()},
            "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        }

    @property
    def layout(self) -> dict[str, Any]:
        """How the ranks shared the video, for the record."""
        mesh, config = self.mesh, self.config.parallel
        degrees = {"cfg": mesh.cfg.size, "ring": mesh.ring.size, "ulysses": mesh.ulysses.size}
        chosen = {"local_route": config.local_route, "provider": config.provider, "why": self.ranks.why}
        return {"ranks": mesh.world.size, **degrees, **chosen}

    def close(self) -> None:
        """Take the method off the pipeline again."""
        self.handle.remove()
        self._release_group()

    def _release_group(self) -> None:
        if self._alone:
            GROUP_OF_ONE.release()
            self._alone = False

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
        it; the file of another run is a UserError. Remove it once the latents are kept.
        """
        sampler, video = self.config.sampler, self.config.video
        seed = sampler.seed if seed is None else seed
        negative_prompt = sampler.negative_prompt if negative_prompt is None else negative_prompt
        num_frames = video.num_frames if num_frames is None else num_frames
        self.spec.check_video(num_frames, video.height, video.width)
        self.decoder.decode_plan = None  # of the video before

        started = time.perf_counter()
        text = self._encode([prompt, negative_prompt] if sampler.guidance_scale > 1.0 else [prompt])
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
        return Denoised(latents=latents.float().cpu(), steps=loop.steps, seconds=seconds, resumed_at=done)

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Frames of latents [1, z, F, h, w], uint8 [t, H, W, 3] at a time, on rank 0: t = 1, then 4 per latent frame.

        Every rank calls this with the same latents and runs the iterator to its end: the others do their share, if there
        is one, and get no frames. `decode_plan` says from the call on who decodes what.
        """
        return self.decoder.decode(latents)

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
        none = np.empty((0, self.config.video.height, self.config.video.width, 3), np.uint8)
        frames = np.concatenate([none, *self.decode(denoised.latents)])
        seconds = {"load": self.load_seconds, **denoised.seconds, "decode": time.perf_counter() - started}
        record = build_record(
            self, prompt=prompt, seed=seed, negative_prompt=negative_prompt, denoised=denoised, seconds=seconds
        )
        return Result(latents=denoised.latents, frames=frames, record=record)

    def _apply_method(self) -> MethodHandle:
        config = self.config
        return apply_method(
            self.pipe,
            method=config.method.method,
            window_frames=config.method.window_frames,
            kernel=config.attention.kernel,
            ranks=self.ranks,
        )

    def _check(self) -> tuple[WanSpec, dict[str, bytes]]:
        """All that the configuration shows to be wrong, and what the ranks must agree on."""
        config = self.config
        try:
            select_kernel(config.attention.kernel, self.device, pick_dtype(config.model.dtype, self.device))
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.mesh.cfg.size > 1 and config.sampler.guidance_scale <= 1.0:
            raise UserError(
                f"parallel.cfg is {self.mesh.cfg.size}, but sampler.guidance_scale {config.sampler.guidance_scale} runs "
                "one pass only; use parallel.cfg 1"
            )
        source = find_checkpoint(config.model.path)
        folder = fetch(source, config.model.revision, parts=())
        spec = read_spec(folder)
        spec.check_video(config.video.num_frames, config.video.height, config.video.width)
        check_tiles(config.decode, spec.spatial_factor)
        return spec, fingerprints(config, folder, from_hub=isinstance(source, str))

    def _load(self) -> WanPipeline:
        """The pipeline; the text encoder on rank 0 only."""
        return load_pipeline(self.config.model, with_text=self.is_first, text_device=self.config.parallel.text_device)

    def _encode(self, prompts: list[str]) -> list[Tensor]:
        """Text embeddings [1, K, C] of each prompt, made by rank 0."""
        max_tokens = self.config.sampler.max_text_tokens
        transformer = self.pipe.transformer

        def encode() -> list[Tensor]:
            if self.is_first:
                return WanAdapter.encode_text(self.pipe, prompts, max_tokens, self.device)
            shape = (1, max_tokens, transformer.config.text_dim)
            return [torch.empty(shape, dtype=transformer.dtype, device=self.device) for _ in prompts]

        embeds = together(self.mesh, encode)
        return [hand_out(self.mesh, embed, "text embeddings") for embed in embeds]

    def _first_latents(self, num_frames: int, seed: int, checkpoint: Path | None, run_id: str) -> tuple[Tensor, int]:
        """Noise and 0, or an interrupted run's latents and the number of its finished steps."""
        found = checkpoint is not None and self.is_first and checkpoint.exists()
        data = hand_out_bytes(self.mesh, checkpoint.read_bytes() if found else b"", "checkpoint")
        if data:
            return load_run(data, path=checkpoint, run_id=run_id, scheduler=self.pipe.scheduler, device=self.device)
        shape = self.spec.latent_shape(num_frames, self.config.video.height, self.config.video.width)
        return draw_noise(shape, seed).to(self.device), 0

    def _run_id(self, **what: Any) -> str:
        """Hash of all that decides the latents: two runs with the same one have the same latents, but for rounding.

        Not the ranks, nor where the weights lie: another number of ranks, or offload, continues the same run.
        """
        tree = dataclasses.asdict(self.config)
        decides = {key: tree[key] for key in ("sampler", "method", "attention")}
        size = {key: tree["video"][key] for key in ("height", "width")}
        model = {"checkpoint": self._prints["checkpoint"].hex(), "dtype": str(self.pipe.transformer.dtype)}
        text = json.dumps({**decides, **size, **model, "device": self.device.type, **what}, sort_keys=True)
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
        with self.engine.progress("denoise", total=total, initial=done) as bar:
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
        scale = self.engine.config.sampler.guidance_scale
        cfg = self.engine.mesh.cfg
        if len(self.text) == 1:
            return self.one_pass(latents, timestep, 0)
        if cfg.size == 1:
            cond, uncond = (self.one_pass(latents, timestep, index) for index in (0, 1))
        else:  # each half of the ranks runs one pass
            mine = self.one_pass(latents, timestep, cfg.rank)
            cond, uncond = self.engine.handle.state.layout.cfg_exchange(mine)
        return uncond + scale * (cond - uncond)

    def one_pass(self, latents: Tensor, timestep: Tensor, index: int) -> Tensor:
        """The conditional (0) or unconditional (1) pass; the trace hears the conditional one."""
        if self.trace is not None:
            self.trace.enabled = index == 0
        pipe = self.engine.pipe
        with pipe.transformer.cache_context(("cond", "uncond")[index]):
            return WanAdapter.predict(pipe, latents, timestep, self.text[index])

    def save(self, done: int, latents: Tensor, state: SchedulerState) -> None:
        """Keep what was computed."""
        if self.path is None or done == 0 or not self.engine.is_first:
            return
        # The usual stream may wait for ever, for a collective whose other ranks have ended; these tensors need no wait.
        beside = torch.cuda.stream(torch.cuda.Stream(latents.device)) if latents.is_cuda else contextlib.nullcontext()
        with beside:
            save_run(self.path, latents, step=done, run_id=self.run_id, state=state)
