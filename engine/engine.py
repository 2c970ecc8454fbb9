"""The engine: a loaded model that makes videos from prompts, in resumable stages."""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from engine.adapters import ModelAdapter, VideoSpec, adapter_of
from engine.adapters.base import Condition
from engine.checks import check_beside, check_call, check_kernels, check_model, check_ranks
from engine.config import MethodConfig, OutputConfig, RunConfig
from engine.decode.decoder import VideoDecoder
from engine.denoise.denoise import Denoised
from engine.denoise.guided_model import GuidedModel
from engine.denoise.loop import DenoiseLoop, Preview
from engine.denoise.noise import draw_noise
from engine.denoise.snapshot import Snapshot
from engine.devices import pick_device, pick_dtype
from engine.errors import UserError
from engine.given.frames import GivenFrames
from engine.given.known import Known, check_needs, read_given_on_ranks
from engine.hooks.apply import MethodHandle, apply_method
from engine.hooks.cross_attention import install_timeline
from engine.hooks.step_cache import step_cache
from engine.hooks.step_hook import choose_eigensolver
from engine.kernel_choice import choose_on_ranks
from engine.load.checkpoint import Checkpoint, open_checkpoint
from engine.load.experts import ExpertPlacement
from engine.load.pipeline import load_pipeline
from engine.load.provenance import describe_loaded, describe_weights
from engine.load.sharded_weights import shard_pipeline, shards_text
from engine.planner.arrange import idle_stays
from engine.progress import enabled, progress_bar
from engine.ranks.agreement import broadcast_bytes, check_agreement, from_first, raise_once_all_end, setting_prints
from engine.ranks.group_of_one import GROUP_OF_ONE
from engine.ranks.layouts import Ranks, check_layout
from engine.record import EngineFacts, build_record, running_revision
from engine.schedulers import make_scheduler, set_timesteps
from engine.spectra.trace import SpectralTrace
from engine.text.encode import PromptEncoder
from engine.text.timeline import Direction, read_direction
from freespec.events import Event
from parallel.mesh import SeqMesh


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished video: latents [1, z, F, h, w] fp32, frames uint8 [T, H, W, 3] (on rank 0 only), and the record."""

    latents: Tensor
    frames: np.ndarray
    record: dict[str, Any]


class LongVideoEngine:
    """A loaded model with a method, ready to make videos; `close` removes the method from the pipeline."""

    def __init__(self, config: RunConfig, ranks: Ranks | None = None) -> None:
        """Load the checkpoint of `config`; with `ranks`, every rank makes its engine from the same configuration.

        Raises UserError, on all ranks together, for mistakes of the user, and before weights are read for those that the
        configuration alone reveals.
        """
        self.config = config
        self.device = pick_device(config.model.device)
        self._alone, self._closed = ranks is None, False
        self.ranks = ranks or Ranks(mesh=GROUP_OF_ONE.acquire(), why="one process", nodes=(socket.gethostname(),))
        if self.is_first:
            running_revision()  # now, as the commit may change before the first record
        started = time.perf_counter()
        try:
            with self.progress("load", total=1) as bar:
                self.checkpoint = raise_once_all_end(self.ranks, self._check, "checking the checkpoint")
                digest = bytes.fromhex(self.checkpoint.digest)
                check_agreement(self.mesh, setting_prints(config) | {"checkpoint": digest})
                self._idle_stays = self._choose_idle()
                self.pipe, self._weights = self._load()
                bar.update()
            self.decoder = VideoDecoder(
                config, vae=self.pipe.vae, spec=self.spec, device=self.device, world=self.mesh.world
            )
            self.choose_kernel()
            self.handle = self._apply_method()
            self.pipe.scheduler = make_scheduler(self.pipe.scheduler, config.sampler)
        except BaseException:
            self._release_group()
            raise
        self._compiled_for: tuple[Event, ...] | None = None
        self.text = PromptEncoder(
            config,
            pipe=self.pipe,
            adapter=self.adapter,
            mesh=self.mesh,
            device=self.device,
            checkpoint=self.checkpoint.digest,
        )
        self.load_seconds = time.perf_counter() - started

    def choose_kernel(self) -> None:
        """Choose the attention kernel for the video of the configuration; the next method that is used takes it."""
        self.kernel = choose_on_ranks(self.config, self.spec, self.pipe.transformer, self.ranks, self.device)

    def use_method(self, method: MethodConfig, output: OutputConfig | None = None) -> None:
        """Replace the method on the loaded model; `output` replaces the settings of its files, if given.

        Raises UserError, and keeps the current method, for one that these ranks cannot run.
        """
        check_layout(method.name, method.method, self.ranks.degrees)
        config = replace(self.config, method=method, output=output or self.config.output)
        self.handle.remove()
        self.placement.bring(
            self.checkpoint.experts[0]
        )  # whose device is the method's; the last video may have sent it away
        self.config = config
        self.handle = self._apply_method()

    @property
    def placement(self) -> ExpertPlacement:
        """Where the transformers are, if there are two."""
        return ExpertPlacement(experts=self.adapter.experts(self.pipe), device=self.device, idle_stays=self._idle_stays)

    @property
    def adapter(self) -> ModelAdapter:
        """The adapter of the loaded model."""
        return adapter_of(self.pipe)

    @property
    def spec(self) -> VideoSpec:
        """The numbers of the checkpoint."""
        return self.checkpoint.spec

    @property
    def mesh(self) -> SeqMesh:
        """The ranks that share the video."""
        return self.ranks.mesh

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which encodes the text, shows progress and writes files."""
        return self.mesh.world.rank == 0

    def progress(self, stage: str, *, total: int, initial: int = 0) -> tqdm:
        """Open the progress bar of a stage, on rank 0 and if `output.progress` shows it."""
        show = self.is_first and enabled(self.config.output.progress)
        return progress_bar(total=total, initial=initial, desc=stage, enabled=show)

    @property
    def facts(self) -> EngineFacts:
        """What records say of this engine."""
        parallel = self.config.parallel
        return EngineFacts(
            config=self.config,
            device=self.device,
            attention=self.kernel,
            eigensolver=self.handle.state.eigensolver,
            model=describe_loaded(self.config.model, self.pipe, self._weights, self.device),
            parallel=self.ranks.described(local_route=parallel.local_route, provider=parallel.provider),
        )

    def __enter__(self) -> Self:
        """The engine itself, for `with`, which closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Remove the method from the pipeline."""
        self._closed = True
        self.handle.remove()
        self._release_group()

    def _release_group(self) -> None:
        if self._alone:
            GROUP_OF_ONE.release()
            self._alone = False

    @torch.no_grad()
    def denoise(  # noqa: PLR0913 - the inputs of one video
        self,
        prompt: str,
        *,
        seed: int | None = None,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        given: GivenFrames | None = None,
        snapshot: Path | None = None,
        snapshot_every: int = 0,
        trace: SpectralTrace | None = None,
        on_step: Callable[[int, int], None] | None = None,
        preview: Preview | None = None,
    ) -> Denoised:
        """Make the latents of one video. Arguments that are None are taken from the configuration.

        With `snapshot`, an interrupted or failed run saves its state there, and the same run continues from it; the file
        of another run is a UserError. Delete it once the latents are saved. `snapshot_every` also saves the state after
        every so many steps and after the last, for processes that may be killed. Latents that are not finite raise UserError,
        on all ranks together, and save no state. With `sampler.cache` only the last state is saved. `on_step(finished, total)` is called after each step, and `preview` on
        rank 0 inside each, see `DenoiseLoop`. `given` are given frames of the video.
        """
        if self._closed:
            raise UserError("this engine is closed and has no method; make another LongVideoEngine")
        if trace is not None:
            self.config.check_traceable()
        sampler, video = self.config.sampler, self.config.video
        seed = sampler.seed if seed is None else seed
        negative_prompt = sampler.negative_prompt if negative_prompt is None else negative_prompt
        num_frames = video.num_frames if num_frames is None else num_frames
        check_call(prompt, negative_prompt, seed)
        self.spec.check_video(num_frames, video.height, video.width)
        check_needs(given, self.spec, num_frames=num_frames, fps=video.fps)
        check_beside(self.config, self.spec, given, num_frames=num_frames)

        started = time.perf_counter()
        direction = read_direction(
            prompt, negative_prompt, num_frames=num_frames, fps=video.fps, step=self.spec.token_step
        )
        passes = self.text.passes(prompt, negative_prompt, direction)
        seconds = {"text": time.perf_counter() - started}

        known, condition = self._read_given(given, num_frames, seed)
        call = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed, "num_frames": num_frames}
        facts = {} if given is None else {"given": self.given_settings(given, num_frames)}
        settings = self.checkpoint.settings(self.config, **call, **facts)
        scheduler, latent = self.pipe.scheduler, self.spec.latent_shape(num_frames, video.height, video.width)[2:]
        window = self.config.method.window_frames * self.spec.patch[0]
        schedule = set_timesteps(self.adapter, scheduler, sampler, latent, window_frames=window, device=self.device)
        generator = torch.Generator("cpu").manual_seed(seed)
        file = None if snapshot is None else Snapshot(snapshot, settings)
        found = file.read() if file is not None and self.is_first else b""
        data = broadcast_bytes(self.mesh, found, "snapshot")
        if file is not None and data:
            latents, done, history = file.load(data, scheduler, generator, self.device)
        else:
            latents, done, history = self._draw_noise(num_frames, generator).to(self.device), 0, {}

        started = time.perf_counter()
        loop = DenoiseLoop(
            model=GuidedModel(
                pipe=self.pipe,
                adapter=self.adapter,
                handle=self.handle,
                mesh=self.mesh,
                text=passes,
                guidance=dict(zip(self.checkpoint.experts, sampler.guidance, strict=False)),
                placement=self.placement,
                fps=video.fps,
                trace=trace,
                condition=condition,
            ),
            scheduler=scheduler,
            generator=generator,
            known=known,
            progress=self.progress,
            save=file.save if file is not None and self.is_first else None,
            save_every=snapshot_every,
            caches=sampler.cache != "none",
            on_step=on_step,
            preview=preview if self.is_first else None,
        )
        loop.take_up(history)
        with self._directed(direction), self._beside(condition), self._cached():
            latents = loop.run(latents, done)
        seconds["denoise"] = time.perf_counter() - started
        return Denoised(
            latents=latents.float().cpu(),
            steps=loop.steps,
            schedule=schedule,
            seconds=seconds,
            resumed_at=done,
            settings=settings,
            timeline=None if direction is None else direction.described(self.spec.token_step),
            given=None if given is None else self._record_given(given, num_frames, known),
        )

    def decode(self, latents: Tensor, *, seed: int | None = None) -> Iterator[np.ndarray]:
        """Decode latents [1, z, F, h, w] to frames, uint8 [t, H, W, 3] at a time, on rank 0; see `VideoDecoder.decode`.

        Every rank calls this with the same latents and exhausts the iterator. `seed` is the one of `denoise`.
        """
        return self.decoder.decode(latents, seed=seed)

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        seed: int | None = None,
        given: GivenFrames | None = None,
        trace: SpectralTrace | None = None,
    ) -> Result:
        """Make one video in memory: latents, frames and the record. Arguments that are None are taken from the configuration.

        `given` are given frames of the video, such as `parse_given(["first=cat.png"], None)`.
        """
        denoised = self.denoise(
            prompt, negative_prompt=negative_prompt, num_frames=num_frames, seed=seed, given=given, trace=trace
        )
        started = time.perf_counter()
        none = np.empty((0, self.config.video.height, self.config.video.width, 3), np.uint8)
        frames = np.concatenate([none, *self.decode(denoised.latents, seed=seed)])
        seconds = {"load": self.load_seconds, **denoised.seconds, "decode": time.perf_counter() - started}
        record = build_record(self.facts, denoised, seconds=seconds, decode=self.decoder.decode_plan)
        return Result(latents=denoised.latents, frames=frames, record=record)

    def _apply_method(self) -> MethodHandle:
        config = self.config
        handle = apply_method(
            self.pipe,
            method=config.method.method,
            window_frames=config.method.window_frames,
            kernel=self.kernel.kernel,
            dual=config.attention.dual,
            complement=config.attention.complement,
            far=config.attention.far,
            ranks=self.ranks,
            riflex=config.attention.riflex,
        )
        handle.state.checks_finite = False  # the denoising loop does, after each step
        choose_eigensolver(handle.state, self.pipe.transformer, self.device)
        if config.model.compile:
            torch.compiler.reset()  # graphs of a removed method count towards the recompile limit of a block
            for expert in self.adapter.experts(self.pipe).values():
                expert.compile_repeated_blocks()
        return handle

    def _check(self) -> Checkpoint:
        """Check the configuration against device, ranks and checkpoint; returns the checkpoint."""
        config, video = self.config, self.config.video
        check_kernels(config, self.device, pick_dtype(config.model.dtype, self.device))
        check_ranks(config, self.ranks)
        checkpoint = open_checkpoint(config.model)
        checkpoint.spec.check_video(video.num_frames, video.height, video.width)
        files = {
            "index": "model_index.json",
            "transformer": "transformer/config.json",
            "scheduler": "scheduler/scheduler_config.json",
        }
        configs = {name: checkpoint.read(file) for name, file in files.items()}
        check_model(config, checkpoint.adapter, checkpoint.spec, **configs)
        return checkpoint

    def _choose_idle(self) -> bool:
        """Whether the transformer of two that does not denoise stays on the device, as rank 0 predicts it for all."""
        choice = self.config.model.idle_expert
        if len(self.checkpoint.experts) == 1 or choice != "auto":
            return choice != "leave"

        def predict() -> bytes:
            return bytes([idle_stays(self.config, self.ranks.degrees, self.device)])

        return bool(from_first(self.mesh, predict, "where the idle transformer waits")[0])

    def _load(self) -> tuple[DiffusionPipeline, dict[str, Any]]:
        """Load the pipeline, sharded with model.weights zero3, and describe its files on rank 0, which writes records."""
        model, text_device = self.config.model, self.config.parallel.text_device
        shares_text = shards_text(model, text_device)
        load = partial(
            load_pipeline,
            model,
            with_text=self.is_first or shares_text,  # rank 0 may fetch and read twice as much as the others
            with_pictures=self.is_first,
            text_device=text_device,
            idle_stays=self._idle_stays,
        )
        pipe = raise_once_all_end(self.ranks, load, "loading the weights")
        if model.weights == "zero3":
            shard_pipeline(pipe, model, with_text=shares_text, mesh=self.mesh, device=self.device)
        described = partial(describe_weights, model) if self.is_first else dict
        return pipe, raise_once_all_end(self.ranks, described, "hashing the weights")

    def _directed(self, direction: Direction | None) -> contextlib.AbstractContextManager[object]:
        """Apply the events of a timeline to the pipeline for a block."""
        events = None if direction is None else direction.events
        if self.config.model.compile and events != self._compiled_for:
            torch.compiler.reset()  # graphs of other events count towards the recompile limit of a block
        self._compiled_for = events
        if direction is None:
            return contextlib.nullcontext()
        return install_timeline(
            list(self.adapter.experts(self.pipe).values()),
            self.adapter,
            lambda _frames: direction.events,
            num_texts=len(direction.texts),
            text_tokens=self.config.sampler.max_text_tokens,
        )

    @contextlib.contextmanager
    def _beside(self, condition: Condition | None) -> Iterator[None]:
        """Tell the method for a block where the tokens of a condition stand beside those of the video."""
        state = self.handle.state
        state.beside = () if condition is None else condition.places(self.spec.temporal_factor)
        try:
            yield
        finally:
            state.beside = ()

    def _cached(self) -> contextlib.AbstractContextManager[None]:
        """Put the step cache on the transformers for a block; each has those steps that it denoises."""
        steps: dict[str, list[int]] = {part: [] for part in self.checkpoint.experts}
        for step, timestep in enumerate(self.pipe.scheduler.timesteps.tolist()):
            steps[self.adapter.expert_at(timestep, self.pipe.config)].append(step)
        return step_cache(self.handle.state, steps, self.pipe, self.config.sampler)

    def _draw_noise(self, num_frames: int, generator: torch.Generator) -> Tensor:
        """Draw the initial noise, on the CPU."""
        shape = self.spec.latent_shape(num_frames, self.config.video.height, self.config.video.width)
        kind, stride = self.config.noise
        window = self.config.method.window_frames * self.spec.patch[0]
        return draw_noise(shape, generator, kind, window_frames=window, stride=stride * self.spec.patch[0])

    def _read_given(
        self, given: GivenFrames | None, num_frames: int, seed: int
    ) -> tuple[Known | None, Condition | None]:
        """Encode the given frames: those that stay known, with the initial noise at their places, and the model's condition."""
        if given is None:
            return None, None
        video = self.config.video
        size = {"num_frames": num_frames, "height": video.height, "width": video.width, "fps": video.fps}
        known, condition = read_given_on_ranks(given, self.adapter, self.pipe, self.spec, mesh=self.mesh, **size)
        if known is not None:
            noise = self._draw_noise(num_frames, torch.Generator("cpu").manual_seed(seed))
            known = known.with_noise(noise, self.device, given.max_noise)
        return known, None if condition is None else condition.to(self.device)

    def given_settings(self, given: GivenFrames, num_frames: int) -> dict[str, Any]:
        """The settings of given frames, see `GivenFrames.settings`, from rank 0, which alone may see the files."""
        spec, video = self.spec, {"num_frames": num_frames, "fps": self.config.video.fps}

        def read() -> bytes:
            return json.dumps(given.settings(**video, step=spec.temporal_factor, pictures=spec.pictures)).encode()

        return json.loads(from_first(self.mesh, read, "given frames"))

    def _record_given(self, given: GivenFrames, num_frames: int, known: Known | None) -> dict[str, Any]:
        begun, spec, video = 0, self.spec, {"num_frames": num_frames, "fps": self.config.video.fps}
        if given.extend is not None and known is not None:
            conditions = given.trained(**video, pictures=spec.pictures)
            begun = spec.num_frames(len(known.frames) - len(given.images) + len(conditions))
        return given.record(**video, step=spec.temporal_factor, begun=begun, pictures=spec.pictures)
