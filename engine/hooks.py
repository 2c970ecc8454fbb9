"""What is installed on a frozen transformer: a processor on every attn1, and one hook that tells it the step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from engine.adapters.wan import WanAdapter
from engine.trace import Trace
from freespec.attention import WindowedAttention
from freespec.kernels import select_kernel
from freespec.methods import Method, Mode, StepPlan


@dataclass
class RunState:
    """What every attn1 of one transformer shares. The root hook writes it before each forward; processors only read.

    The processors read strings and tensors, not numbers: a compiled block is compiled once per mode, not once per step.
    """

    method: Method
    window_frames: int
    kernel_name: str
    mode: Mode = "global"
    weights: Any = None
    attention: WindowedAttention | None = None
    step: int = 0
    trace: Trace | None = None


class BranchProcessor:
    """Attention processor of one attn1: both branches and their fusion in place of full attention."""

    def __init__(self, state: RunState, layer: int) -> None:
        self.state = state
        self.layer = layer

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention of hidden states [B, s, C]; the text arguments are those of diffusers' interface and unused."""
        if encoder_hidden_states is not None or attention_mask is not None or rotary_emb is None:
            raise ValueError("this processor serves self-attention with a rotary table and without a mask only")
        state = self.state
        q, k, v = WanAdapter.qkv(attn, hidden_states, rotary_emb)
        if state.mode == "global":
            out_local, out_global = None, state.attention.dense(q, k, v)[0]
        elif state.mode == "local":
            out_local, out_global = state.attention.local(q, k, v, 0, 0)[0], None
        else:
            out_local, out_global = state.attention.both(q, k, v)
        if state.trace is not None:
            state.trace.record(self.layer, state.step, out_local, out_global, state.weights)
        if state.mode == "dual":
            out = state.method.fuse(out_local, out_global, state.weights, _whole)
        else:
            out = out_global if out_local is None else out_local
        return WanAdapter.project_out(attn, out)


def _whole(total: Tensor) -> Tensor:
    """The sum over the shards of the tokens where one process holds all of them."""
    return total


class StepHook:
    """Forward pre-hook of the transformer: finds the step, the grid and the mode, and checks that they belong together."""

    def __init__(self, state: RunState, scheduler: Callable[[], Any]) -> None:
        self.state = state
        self._scheduler = scheduler
        self._timesteps: list[float] = []
        self._plan: list[StepPlan] = []

    def __call__(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Fill the state for this forward."""
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        if timestep.dim() != 1:
            raise ValueError(f"expected one timestep per video, got a tensor of shape {tuple(timestep.shape)}")
        state = self.state
        state.step = self._find_step(float(timestep[0]))
        frames, frame_tokens = WanAdapter.grid(transformer, latents)
        state.attention = WindowedAttention(
            num_frames=frames,
            frame_tokens=frame_tokens,
            window_frames=state.window_frames,
            kernel=select_kernel(state.kernel_name, latents.device, latents.dtype),
        )
        step = self._plan[state.step]
        # At native length both branches are the whole video, and the stock computation is kept bit for bit.
        mode: Mode = "global" if frames <= state.window_frames else step.mode
        state.mode = mode
        state.weights = None
        if mode == "dual":
            head_dim = transformer.config.attention_head_dim
            state.weights = state.method.weights(step, head_dim, latents.device)

    def _find_step(self, timestep: float) -> int:
        """Index of this forward in the scheduler's timesteps; an error if the forward belongs to another step."""
        scheduler = self._scheduler()
        timesteps = _timestep_list(scheduler.timesteps)
        if timesteps != self._timesteps:
            self._timesteps, self._plan = timesteps, self.state.method.plan(timesteps)
        step = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
        if step >= len(timesteps) or timesteps[step] != timestep:
            raise ValueError(
                f"the transformer was called at timestep {timestep}, but its scheduler stands at step {step} of "
                f"{len(timesteps)}; call it through its pipeline, which sets the scheduler"
            )
        return step


def _timestep_list(timesteps: Tensor) -> list[float]:
    return [float(t) for t in timesteps.tolist()]
