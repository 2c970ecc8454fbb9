"""One run of the denoising loop: guidance, progress bar, trace, timing, and the checkpoint of a run that ends early."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.adapters.base import Text
from engine.checkpoint import History, save_run
from engine.denoise import NotFiniteError, check_finite, denoise
from engine.identity import settings_id
from engine.known import Known
from engine.ranks import first_failure
from engine.schedulers import SchedulerState, scheduler_state
from engine.spectra.trace import SpectralTrace
from engine.waiting import wait_for
from freespec import eigen

if TYPE_CHECKING:
    from engine.engine import LongVideoEngine


@dataclass(kw_only=True)
class DenoiseLoop:
    """What an engine does around `engine.denoise.denoise` for one video.

    Attributes:
        engine: the model, its method and its scheduler with the timesteps set.
        text: text of each pass by its name, `cond` first, and `uncond` with guidance.
        generator: has drawn the first noise, and draws that of a scheduler that adds some in its steps.
        trace: hears the conditional pass, if given.
        path: where a run that ends early leaves its state; None keeps none.
        settings: what decides the latents, which says whose state that is.
        known: frames that are given, with their noise.
        checkpoint_every: steps after which the state is also written; 0 writes it at an early end only.
        on_step: called with the finished steps and their total after each.
        steps: what is noted of each finished step, see `engine.engine.Denoised`.
    """

    engine: "LongVideoEngine"
    text: dict[str, Text]
    generator: torch.Generator
    trace: SpectralTrace | None
    path: Path | None
    settings: dict[str, Any]
    known: Known | None
    checkpoint_every: int
    on_step: Callable[[int, int], None] | None
    steps: list[dict[str, Any]] = field(default_factory=list)

    def take_up(self, history: History) -> None:
        """Begin with what an earlier, interrupted run noted of its steps, so that record and trace tell of all of them."""
        self.steps += history.get("steps", [])
        if self.trace is not None:
            self.trace.rows += history.get("trace", [])

    def run(self, latents: Tensor, done: int) -> Tensor:
        """Denoise from `done` finished steps on."""
        scheduler = self.engine.pipe.scheduler
        self.engine.pipe.transformer._reset_stateful_cache()  # of the video before, if diffusers was told to keep one
        total = len(scheduler.timesteps)
        reached = (done, latents, scheduler_state(scheduler, self.generator))
        with self.engine.progress("denoise", total=total, initial=done) as bar:
            started = time.perf_counter()

            def after_step(finished: int, latents: Tensor) -> None:
                nonlocal started, reached
                wait_for(latents.device)  # the clock is read once the device has done the step
                self.check(latents, finished, total)
                mode = self.engine.handle.state.mode
                timestep = float(scheduler.timesteps[finished - 1])
                now = time.perf_counter()
                self.steps.append({"step": finished - 1, "timestep": timestep, "mode": mode, "seconds": now - started})
                started, reached = now, (finished, latents, scheduler_state(scheduler, self.generator))
                bar.set_postfix(mode=mode)
                bar.update()
                if self.checkpoint_every and (finished % self.checkpoint_every == 0 or finished == total):
                    self.save(*reached)
                if self.on_step is not None:
                    self.on_step(finished, total)

            self.engine.handle.state.trace = self.trace
            eigen.take_failure()  # of a video before
            try:
                return denoise(
                    latents,
                    scheduler,
                    self.predict,
                    generator=self.generator,
                    start_step=done,
                    known=self.known,
                    after_step=after_step,
                )
            except NotFiniteError:  # the steps before would only lead there again
                raise
            except BaseException:
                self.save(*reached)
                raise
            finally:
                self.engine.handle.state.trace = None

    def check(self, latents: Tensor, finished: int, total: int) -> None:
        """Raise UserError for latents that overflowed, before more steps, or a video, are made of them."""
        dtype = str(self.engine.pipe.transformer.dtype).removeprefix("torch.")
        others = " or ".join(name for name in ("float32", "bfloat16") if name != dtype)
        try:
            check_finite(
                latents,
                where=f"after step {finished} of {total} in {dtype}",
                remedy=f"take model.dtype {others}, a sampler.guidance_scale below "
                f"{self.engine.config.sampler.guidance_scale}, or fetch the weights again",
            )
        except NotFiniteError as error:
            cause = first_failure(self.engine.mesh, eigen.take_failure())
            if cause is None:
                raise
            raise NotFiniteError(f"step {finished} of {total} failed: {cause}; use another version of torch") from error

    def predict(self, latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        """Velocity with classifier-free guidance, as the model's own pipeline combines it."""
        self.engine.handle.check()  # of another transformer in its place no hook would hear
        adapter, cfg = self.engine.adapter, self.engine.mesh.cfg
        passes = list(self.text)
        if cfg.size > 1:  # each half of the ranks runs one pass
            [mine] = self.forward(latents, timestep, [passes[cfg.rank]])
            predictions: Sequence[Tensor] = self.engine.handle.state.layout.cfg_exchange(mine)
        else:
            batches = [passes] if adapter.batches_guidance else [[name] for name in passes]
            predictions = [part for batch in batches for part in self.forward(latents, timestep, batch)]
        guided = adapter.guide(predictions, self.engine.config.sampler.guidance_scale)
        wait_for(guided.device)  # here, as schedulers copy numbers to the device, which waits for it in C
        return guided

    def forward(self, latents: Tensor, timestep: Tensor, passes: list[str]) -> list[Tensor]:
        """One forward of the transformer with these passes in it; the trace hears the conditional one."""
        if self.trace is not None:
            self.trace.enabled = "cond" in passes
        texts = {name: self.text[name] for name in passes}
        fps = self.engine.config.video.fps
        return self.engine.adapter.predict(self.engine.pipe, latents, timestep, texts, fps=fps)

    def save(self, done: int, latents: Tensor, state: SchedulerState) -> None:
        """Keep what was computed."""
        if self.path is None or done == 0 or not self.engine.is_first:
            return
        # The usual stream is still busy with the step that was interrupted, or waits for ever for ranks that have ended; these
        # tensors were finished before it.
        beside = torch.cuda.stream(torch.cuda.Stream(latents.device)) if latents.is_cuda else contextlib.nullcontext()
        with beside:
            history = {"steps": self.steps, "trace": self.trace.rows if self.trace is not None else []}
            finished = {name: [row for row in rows if row["step"] < done] for name, rows in history.items()}
            save_run(
                self.path,
                latents,
                step=done,
                run_id=settings_id(self.settings),
                settings=self.settings,
                state=state,
                history=finished,
            )
