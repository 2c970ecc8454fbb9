"""One run of the denoising loop: progress bar, timing, checks of each step, and the snapshot of a run that ends early."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.denoise.denoise import denoise
from engine.denoise.guided_model import GuidedModel
from engine.denoise.snapshot import History
from engine.devices import wait_for
from engine.errors import NotFiniteError, check_finite
from engine.given.known import Known
from engine.ranks.agreement import first_failure
from engine.schedulers import SchedulerState, scheduler_state
from freespec import eigen

Save = Callable[[int, Tensor, SchedulerState, History], None]
Preview = Callable[[int, int, Tensor, Tensor, float], None]


@dataclass(kw_only=True)
class DenoiseLoop:
    """Runs `engine.denoise.denoise.denoise` for one video.

    Attributes:
        model: predicts the velocity.
        scheduler: with its timesteps set.
        generator: has drawn the initial noise, and draws the noise that a scheduler adds in its steps.
        known: given frames, with their noise.
        progress: opens a bar of `total` steps, `initial` of which are done.
        save: saves the number of finished steps, the latents after them, the scheduler's state, and the history of the
            steps; None saves nothing.
        save_every: steps between saves; 0 saves only when the run ends early.
        caches: whether steps may come from a cache, which the history then says of each. What it keeps is not saved, and a run that
            continued without it would end elsewhere, so only finished latents are saved.
        on_step: called with the finished steps and their total after each.
        preview: called before the update of each step with its number from 1, their total, the latents, the velocity and the
            noise level.
        steps: history of the finished steps, see `engine.denoise.denoise.Denoised`.
    """

    model: GuidedModel
    scheduler: Any
    generator: torch.Generator
    known: Known | None
    progress: Callable[..., tqdm]
    save: Save | None
    save_every: int
    on_step: Callable[[int, int], None] | None
    preview: Preview | None = None
    caches: bool = False
    steps: list[dict[str, Any]] = field(default_factory=list)

    def take_up(self, history: History) -> None:
        """Start from the history of an interrupted run, so that record and trace cover all steps."""
        self.steps += history.get("steps", [])
        if self.model.trace is not None:
            self.model.trace.rows += history.get("trace", [])

    def run(self, latents: Tensor, done: int) -> Tensor:
        """Denoise from `done` finished steps on."""
        for expert in self.model.placement.experts.values():
            expert._reset_stateful_cache()  # left from the last video, if a diffusers cache is enabled
        total = len(self.scheduler.timesteps)
        reached = (done, latents, scheduler_state(self.scheduler, self.generator))
        with self.progress("denoise", total=total, initial=done) as bar, self.model.traced():
            started, cpu_started = time.perf_counter(), time.process_time()

            def after_step(finished: int, latents: Tensor) -> None:
                nonlocal started, cpu_started, reached
                wait_for(latents.device)  # so that the clock is read after the step
                self.check(latents, finished, total)
                mode = self.model.handle.state.last.mode
                timestep = float(self.scheduler.timesteps[finished - 1])
                now, cpu_now = time.perf_counter(), time.process_time()
                row: dict[str, Any] = {
                    "step": finished - 1,
                    "timestep": timestep,
                    "mode": mode,
                    "seconds": now - started,
                    "cpu_seconds": cpu_now - cpu_started,
                }
                self.steps.append(row | self._more(timestep))
                started, cpu_started = now, cpu_now
                reached = (finished, latents, scheduler_state(self.scheduler, self.generator))
                bar.set_postfix(mode=mode)
                bar.update()
                if self.save_every and (finished % self.save_every == 0 or finished == total):
                    self._save(*reached)
                if self.on_step is not None:
                    self.on_step(finished, total)

            def predict(latents: Tensor, timestep: Tensor) -> Tensor:
                velocity = self.model.predict(latents, timestep)
                if self.preview is not None:
                    self.preview(reached[0] + 1, total, latents, velocity, float(self.scheduler.sigmas[reached[0]]))
                return velocity

            eigen.take_failure()  # left from the last video
            try:
                return denoise(
                    latents,
                    self.scheduler,
                    predict,
                    generator=self.generator,
                    start_step=done,
                    known=self.known,
                    after_step=after_step,
                )
            except NotFiniteError:  # continuing from the last state would fail again
                raise
            except BaseException:
                self._save(*reached)
                raise

    def _more(self, timestep: float) -> dict[str, Any]:
        """What the history says of a step of two transformers, or of one with a cache."""
        more: dict[str, Any] = {}
        if len(self.model.placement.experts) > 1:
            more["expert"] = self.model.expert_at(timestep)
        if self.caches:
            # always a pass of rank 0, which writes records
            more["cached"] = self.model.cached.get("cond", False)
        return more

    def check(self, latents: Tensor, finished: int, total: int) -> None:
        """Raise UserError for latents that are not finite, before more steps or a video are computed from them."""
        dtype = str(self.model.pipe.transformer.dtype).removeprefix("torch.")
        others = " or ".join(name for name in ("float32", "bfloat16") if name != dtype)
        try:
            check_finite(
                latents,
                where=f"after step {finished} of {total} in {dtype}",
                remedy=f"try model.dtype {others}, a sampler.guidance_scale below {max(self.model.guidance.values())}, or fetch "
                "the weights again",
            )
        except NotFiniteError as error:
            cause = first_failure(self.model.mesh, eigen.take_failure())
            if cause is None:
                raise
            raise NotFiniteError(f"step {finished} of {total} failed: {cause}; use another version of torch") from error

    def _save(self, done: int, latents: Tensor, state: SchedulerState) -> None:
        """Save the state after the finished steps, if there are any."""
        if self.save is None or done == 0 or (self.caches and done < len(self.scheduler.timesteps)):
            return
        # On another stream: the current one is busy with the interrupted step, or waits for ranks that have ended, and these
        # tensors are complete.
        beside = torch.cuda.stream(torch.cuda.Stream(latents.device)) if latents.is_cuda else contextlib.nullcontext()
        with beside:
            trace = self.model.trace
            history = {"steps": self.steps, "trace": trace.rows if trace is not None else []}
            finished = {name: [row for row in rows if row["step"] < done] for name, rows in history.items()}
            self.save(done, latents, state, finished)
