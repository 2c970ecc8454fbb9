"""A transformer with its method, text and guidance: predicts the velocity that the scheduler integrates."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from diffusers import DiffusionPipeline
from torch import Tensor

from engine.adapters import ModelAdapter
from engine.adapters.base import Condition, Text
from engine.devices import wait_for
from engine.hooks.apply import MethodHandle
from engine.load.experts import ExpertPlacement
from engine.spectra.trace import SpectralTrace
from parallel.mesh import SeqMesh


@dataclass(frozen=True, kw_only=True)
class GuidedModel:
    """A model with classifier-free guidance for one video, on all ranks of a mesh.

    Attributes:
        pipe: the pipeline, whose transformer has the method.
        adapter: of this model.
        handle: the method.
        mesh: its cfg axis shares the passes.
        text: text of each pass by its name, `cond` first, and `uncond` with guidance.
        guidance: scale of classifier-free guidance of each transformer, by part; with text of `cond` alone it is not read.
        placement: brings the transformer of a step to the device.
        fps: frames per second of the video.
        trace: observes the conditional pass, if given.
        condition: what the model sees of given pictures, on the device; None without any.
        cached: by pass of this rank, whether a cache skipped layers of its last forward.
    """

    pipe: DiffusionPipeline
    adapter: ModelAdapter
    handle: MethodHandle
    mesh: SeqMesh
    text: Mapping[str, Text]
    guidance: Mapping[str, float]
    placement: ExpertPlacement
    fps: int
    trace: SpectralTrace | None
    condition: Condition | None = None
    cached: dict[str, bool] = field(default_factory=dict)

    def predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity with guidance, as the model's own pipeline combines it."""
        self.handle.check()  # the hooks would not see another transformer in its place
        # read only if it decides something: on a GPU that waits
        expert = self.expert_at(float(timestep)) if len(self.guidance) > 1 else next(iter(self.guidance))
        self.placement.bring(expert)
        cfg, passes = self.mesh.cfg, list(self.text)
        if cfg.size > 1:  # each half of the ranks runs one pass
            [mine] = self._forward(latents, timestep, [passes[cfg.rank]], expert)
            predictions: Sequence[Tensor] = self.handle.state.last.layout.cfg_exchange(mine)
        else:
            batches = [passes] if self.adapter.batches_guidance else [[name] for name in passes]
            predictions = [part for batch in batches for part in self._forward(latents, timestep, batch, expert)]
        guided = self.adapter.guide(predictions, self.guidance[expert])
        wait_for(guided.device)  # now, as schedulers copy numbers to the device, which blocks in C
        return guided

    def expert_at(self, timestep: float) -> str:
        """The part that denoises this timestep."""
        return self.adapter.expert_at(timestep, self.pipe.config)

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Let the trace observe the forwards of the block."""
        self.handle.state.trace = self.trace
        try:
            yield
        finally:
            self.handle.state.trace = None

    def _forward(self, latents: Tensor, timestep: Tensor, passes: list[str], expert: str) -> list[Tensor]:
        """One forward of the transformer with these passes in it."""
        if self.trace is not None:
            self.trace.enabled = "cond" in passes
        texts = {name: self.text[name] for name in passes}
        predictions = self.adapter.predict(
            self.pipe, latents, timestep, texts, fps=self.fps, expert=expert, condition=self.condition
        )
        self.cached.update(dict.fromkeys(passes, self.handle.state.last.cached))
        return predictions
