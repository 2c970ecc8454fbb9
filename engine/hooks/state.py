"""State shared by the hooks and processors of one pipeline: a method's setup, and the current forward."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.adapters import ModelAdapter
from engine.hooks.in_force import Uncopyable
from engine.kernel_choice import SolverChoice
from engine.spectra.trace import SpectralTrace
from freespec.attention import WindowedAttention
from freespec.methods import Grid, Method, Mode
from freespec.scenes import ScenedAttention
from parallel.attention import HeadExchange, HybridAttention, SequenceLayout
from parallel.mesh import SeqMesh

NO_FORWARD = (
    "was called without the hooks of its transformer: they were removed, or a part of it was called by hand; call the handle's "
    "remove(), then apply_method again"
)


@dataclass(frozen=True, kw_only=True)
class MethodSetup:
    """A method installed on a transformer; constant until it is removed.

    Attributes:
        adapter: of the model.
        method: the method.
        window_frames: frames of tokens that the local branch sees.
        kernel: setting of the dense kernel.
        dual: setting of the kernel of dual steps.
        complement: setting of the kernel for keys outside the windows.
        far: setting of how many of those keys there are.
        mesh: the ranks that share the video.
        exchange: exchanges heads against tokens.
        hybrid: computes all of `direct` instead, if not None.
        local_route: how local steps cross the ulysses axis.
    """

    adapter: ModelAdapter
    method: Method
    window_frames: int
    kernel: str
    dual: str = "auto"
    complement: str = "same"
    far: int | str = "all"
    mesh: SeqMesh
    exchange: HeadExchange
    hybrid: HybridAttention | None = None
    local_route: str = "auto"


@dataclass(kw_only=True)
class Forward(Uncopyable):
    """One forward of the transformer, written by the step hook and read by the processors.

    Not frozen: torch.compile guards every field of a frozen dataclass, and would recompile a block for each new number.
    """

    step: int
    num_steps: int
    grid: Grid
    mode: Mode
    attention: WindowedAttention | ScenedAttention
    layout: SequenceLayout
    attention_layout: SequenceLayout
    weights: Any = None
    frames: tuple[Tensor, ...] = ()
    rotation: tuple[Tensor, Tensor] | None = None  # of each frame, in mode `tiers`
    layer: int = 0
    cached: bool = False  # whether a cache skipped layers, once the forward has ended

    @property
    def windows(self) -> WindowedAttention:
        """The windows without the ends of scenes."""
        return self.attention.video if isinstance(self.attention, ScenedAttention) else self.attention


@dataclass
class RunState(Uncopyable):
    """State shared by every attn1 of a pipeline's transformers, which run one after the other; the step hook writes it, processors only read.

    The processors read strings and tensors, not numbers: a compiled block is compiled once per mode, not once per step.

    Attributes:
        setup: the constant part.
        forward: the current or last forward; None before the first.
        running: whether it is current, so that no block runs on the state of the last one.
        scenes: frames of tokens after the first at which a timeline ends windows.
        beside: the latent frame after which each frame of tokens of a condition stands (`engine.adapters.base.Condition.beside`).
        checks_finite: whether each forward checks its latents and its prediction; False for a loop that checks after each step.
        trace: observes the branches, if given.
        eigensolver: what decomposes Gram matrices on a GPU; None until the device is known, and on a CPU.
    """

    setup: MethodSetup
    forward: Forward | None = None
    running: bool = False
    scenes: tuple[int, ...] = ()
    beside: tuple[int, ...] = ()
    checks_finite: bool = True
    trace: SpectralTrace | None = None
    eigensolver: SolverChoice | None = None

    @property
    def last(self) -> Forward:
        """The current or last forward."""
        assert self.forward is not None, "no forward yet"
        return self.forward

    def __str__(self) -> str:
        """The run's position, as errors of collectives print it."""
        return (
            "before the first step" if self.forward is None else f"step {self.forward.step} layer {self.forward.layer}"
        )
