"""What is installed on a frozen transformer: a processor on every attn1, a hook that finds the step, three that share tokens."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engine.adapters import ModelAdapter
from engine.denoise import check_finite
from engine.errors import UserError
from engine.kernel_choice import SolverChoice, choose_solver
from engine.trace import Trace
from freespec.attention import WindowedAttention
from freespec.kernels import select_complement, select_dual, select_kernel
from freespec.methods import Branches, Grid, Layer, Method, Mode, StepPlan
from freespec.riflex import Riflex, lowered_frequency
from freespec.rotary import with_frequency
from parallel.attention import HeadExchange, HybridAttention, SequenceLayout
from parallel.collectives import ignore_bytes
from parallel.mesh import SeqMesh
from parallel.plan import LayerShape, SequencePlan, choose_local_route, length


@dataclass
class RunState:
    """What every attn1 of one transformer shares. The root hook writes it before each forward; processors only read.

    The processors read strings and tensors, not numbers: a compiled block is compiled once per mode, not once per step.
    """

    adapter: ModelAdapter
    method: Method
    window_frames: int
    kernel_name: str
    mesh: SeqMesh
    exchange: HeadExchange
    hybrid: HybridAttention | None = None
    dual_name: str = "auto"
    complement_name: str = "same"
    local_route: str = "auto"
    on_bytes: Callable[[str, int], None] = ignore_bytes
    mode: Mode = "global"
    weights: Any = None
    grid: Grid | None = None
    attention: WindowedAttention | None = None
    layout: SequenceLayout | None = None
    attention_layout: SequenceLayout | None = None
    step: int = 0
    layer: int = 0
    num_steps: int = 0
    checks_finite: bool = True  # False where the loop around the transformer looks at each step's latents
    trace: Trace | None = None
    eigensolver: SolverChoice | None = None  # None until the device is known

    def __str__(self) -> str:
        """Where the run is, as the errors of collectives say it."""
        return f"step {self.step} layer {self.layer}"


class BranchProcessor:
    """Attention processor of one attn1: the step's branches and their fusion in place of full attention."""

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
        if not torch.compiler.is_compiling():  # a number per layer would compile every layer by itself
            state.layer = self.layer
        layout = state.attention_layout
        if state.hybrid is not None:  # only with the method direct, whose steps are all global
            out = state.hybrid(*state.adapter.qkv(attn, hidden_states, rotary_emb), layout=layout)
            return state.adapter.project_out(attn, out)
        q, k, v = self._scatter(attn, hidden_states, rotary_emb, layout)
        if state.trace is not None:
            state.trace.observe(self.layer, state.step, (q, k, v), state.attention, layout)
        branches = self._branches(q, k, v, layout)
        if state.mode in ("global", "local"):
            out = branches.wide if state.mode == "global" else branches.local
        else:
            layer = Layer(grid=state.grid, sum_tokens=layout.reduce, sum_heads=layout.sum_heads)
            out = state.method.fuse(branches, state.weights, layer)
        if state.trace is not None:
            local = out if state.mode == "views" else branches.local  # the views as one are a local branch
            state.trace.record(self.layer, state.step, (local, branches.wide), state.weights, layout)
        return state.adapter.project_out(attn, layout.gather(out))

    def _scatter(
        self, attn: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], layout: SequenceLayout
    ) -> tuple[Tensor, ...]:
        """q, k, v [B, r, n, D] of this rank. v is on its way while q and k are rotated, but for a compiled block."""
        qkv = self.state.adapter.qkv
        if torch.compiler.is_compiling() or not layout.sends_early:
            return layout.scatter(*qkv(attn, hidden, rotary))
        early: list[Callable[[], Tensor]] = []
        q, k, _ = qkv(attn, hidden, rotary, on_value=lambda v: early.append(layout.start_scatter(v)))
        return *layout.scatter(q, k), early[0]()

    def _branches(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Branches:
        """What the step's mode asks for, of q, k, v [B, r, n, D]. With views a rank has all tokens of its heads: r = S."""
        state = self.state
        if state.mode not in ("views", "views_global"):
            local, wide = layout.branches(q, k, v, state.mode, state.attention)
            return Branches(local=local, wide=wide)
        wide = None
        if state.mode == "views_global":
            scaled = q * state.method.query_scale(state.grid)
            wide = layout.branches(scaled, k, v, "global", state.attention)[1]
        views = state.attention.views(q, k, v, state.method.view_starts(state.grid))
        return Branches(wide=wide, views=views)


class StepHook:
    """Forward pre-hook of the transformer: finds the step, the grid and the mode, and checks that they belong together."""

    def __init__(self, state: RunState, scheduler: Callable[[], Any]) -> None:
        self.state = state
        self._scheduler = scheduler
        self._read: tuple[Tensor, int] | None = None
        self._timesteps: list[float] = []
        self._plan: list[StepPlan] = []
        self._made_for: tuple[int, Grid, torch.device] | None = None

    def __call__(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Fill the state for this forward."""
        inputs = _signature(type(transformer)).bind(transformer, *args, **kwargs).arguments
        latents, timestep = inputs["hidden_states"], inputs["timestep"]
        if timestep.dim() != 1:
            raise ValueError(f"expected one timestep per video, got a tensor of shape {tuple(timestep.shape)}")
        state = self.state
        refuse_context_parallel(transformer)  # again: it may have been switched on since
        if state.mesh.world.size > 1:
            _refuse_caches_of_one_rank(transformer)
        state.step = self._find_step(timestep)
        state.num_steps = len(self._timesteps)
        if state.checks_finite:
            refuse_not_finite(state, latents, "before")
        frames, rows, columns = state.adapter.grid(transformer, inputs)
        state.grid = Grid(frames=frames, rows=rows, columns=columns, window_frames=state.window_frames)
        state.attention = WindowedAttention(
            num_frames=frames,
            frame_tokens=state.grid.frame_tokens,
            window_frames=state.window_frames,
            kernel=select_kernel(state.kernel_name, latents.device, latents.dtype),
            dual_kernel=select_dual(state.dual_name, latents.device, latents.dtype),
            rest_kernel=select_complement(state.complement_name, latents.device, latents.dtype, dual=state.dual_name),
        )
        step = self._plan[state.step]
        # At native length both branches are the whole video, and the stock computation is kept bit for bit.
        state.mode = "global" if frames <= state.window_frames else step.mode
        head_dim = transformer.config.attention_head_dim
        self._lay_out(state.grid.tokens, transformer.config.num_attention_heads, head_dim, latents)
        if state.eigensolver is None:  # of a pipeline of one's own; an engine chooses when it starts
            choose_eigensolver(state, transformer, latents.device)
        fuses = state.mode not in ("global", "local")
        made_for = (state.step, state.grid, latents.device) if fuses else None
        if (
            made_for != self._made_for
        ):  # once a step: making them copies numbers to the device, which waits for the pass before
            state.weights = state.method.weights(step, state.grid, head_dim, latents.device) if fuses else None
            self._made_for = made_for

    def _find_step(self, timestep: Tensor) -> int:
        """Index of this forward in the scheduler's timesteps; an error if the forward belongs to another step."""
        scheduler = self._scheduler()
        self._read_timesteps(scheduler.timesteps)
        timesteps, value = self._timesteps, self._value(timestep, scheduler.timesteps)
        step = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
        if step >= len(timesteps) or timesteps[step] != value:
            raise ValueError(
                f"the transformer was called at timestep {value}, but its scheduler stands at step {step} of "
                f"{len(timesteps)}; call it through its pipeline, which sets the scheduler"
            )
        return step

    def _read_timesteps(self, timesteps: Tensor) -> None:
        """Copy them to Python once for each tensor: on a GPU the copy waits for all that is queued there."""
        if self._read is not None and self._read[0] is timesteps and self._read[1] == timesteps._version:
            return
        self._read = timesteps, timesteps._version
        values = [float(t) for t in timesteps.tolist()]
        if values != self._timesteps:
            self._timesteps, self._plan, self._made_for = values, self.state.method.plan(values), None

    def _value(self, timestep: Tensor, timesteps: Tensor) -> float:
        """The number in `timestep`; known without reading it where it is a view of the scheduler's, as pipelines hand on."""
        whole = timesteps if timesteps._base is None else timesteps._base
        at = timestep.storage_offset() - timesteps.storage_offset()
        same = timestep._base is whole and timestep.dtype == timesteps.dtype
        if same and timesteps.is_contiguous() and 0 <= at < len(self._timesteps):
            return self._timesteps[at]
        return float(timestep[0])

    def _lay_out(self, num_tokens: int, num_heads: int, head_dim: int, latents: Tensor) -> None:
        """The layout of this video's tokens over the ranks, and the one that this mode's attention uses."""
        state = self.state
        mesh = state.mesh
        if num_tokens < mesh.sequence.size:
            raise UserError(
                f"cannot split {num_tokens} tokens over {mesh.sequence.size} ranks; use fewer ranks or a larger video"
            )
        plan = SequencePlan(tokens=num_tokens, heads=num_heads, ring=mesh.ring.size, ulysses=mesh.ulysses.size)
        state.layout = SequenceLayout(
            mesh=mesh, plan=plan, exchange=state.exchange, trace=mesh.trace(state, state.on_bytes)
        )
        route = state.local_route
        if state.mode == "local" and route == "auto":
            shape = LayerShape(batch=latents.shape[0], head_dim=head_dim, itemsize=latents.element_size())
            route = choose_local_route(plan, shape=shape, halo=state.attention.halo).route
        by_halo = state.mode == "local" and route == "halo"
        state.attention_layout = state.layout.on_shards() if by_halo else state.layout


def choose_eigensolver(state: RunState, transformer: nn.Module, device: torch.device) -> None:
    """Choose what decomposes the Gram matrices of a layer's two branches; on a CPU there is nothing to choose.

    Raises UserError, on all ranks together, if a rank's device has no solver that is right.
    """
    if device.type == "cpu":
        return
    config, mesh = transformer.config, state.mesh
    heads = -(-config.num_attention_heads // mesh.ulysses.size)
    passes = 2 if state.adapter.batches_guidance and mesh.cfg.size == 1 else 1
    state.eigensolver = choose_solver(
        mesh, num_matrices=2 * passes * heads, rows=config.attention_head_dim, device=device
    )


def finite_hook(state: RunState, transformer: nn.Module) -> RemovableHandle:
    """Refuse predictions that are not finite: after the last step no further forward would see what they made of the latents."""

    def check(_module: nn.Module, _args: tuple, output: Any) -> None:
        if state.checks_finite:
            refuse_not_finite(state, output[0], "after")

    return transformer.register_forward_hook(check)


def refuse_not_finite(state: RunState, latents: Tensor, when: str) -> None:
    """Raise UserError for latents or predictions with NaN or infinity, on all ranks together, as all have the same ones."""
    check_finite(
        latents,
        where=f"{when} the transformer of step {state.step + 1} of {state.num_steps} in {str(latents.dtype).removeprefix('torch.')}",
        remedy="load the pipeline in another dtype, take a lower guidance_scale, or fetch the weights again",
    )


@functools.cache
def _signature(transformer_class: type[nn.Module]) -> inspect.Signature:
    """Names of the arguments of a forward; asked of the class, as offload puts another function on the instance."""
    return inspect.signature(transformer_class.forward)


def riflex_hook(state: RunState, transformer: nn.Module, riflex: Riflex) -> RemovableHandle:
    """Lower one temporal frequency of every rotary table of a long video (freespec.rotary), before ranks take their rows."""
    pairs = state.adapter.temporal_frequencies(transformer)
    frequencies = [frequency for frequency, _ in pairs]

    def lower(_module: nn.Module, _args: tuple, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        grid = state.grid
        change = lowered_frequency(riflex, frequencies, num_frames=grid.frames, window_frames=grid.window_frames)
        if change is None:
            return tables
        pair, frequency = change
        return with_frequency(tables, frequency, columns=pairs[pair][1], frame_tokens=grid.frame_tokens)

    _, rotary, _ = state.adapter.shard_points(transformer)
    return rotary.register_forward_hook(lower)


# Hooks of diffusers that do the same on every rank: these caches decide by the step alone, and where weights lie, or in which
# type, decides nothing. Others may skip blocks by what one rank sees of its own tokens: the ranks would part, and wait for each
# other for ever. By whole name, so that no subclass and nothing new passes unseen.
_SAFE_HOOKS = frozenset(
    f"diffusers.hooks.{name}"
    for name in (
        "pyramid_attention_broadcast.PyramidAttentionBroadcastHook",
        "mag_cache.MagCacheHeadHook",
        "mag_cache.MagCacheBlockHook",
        "taylorseer_cache.TaylorSeerCacheHook",
        "layerwise_casting.LayerwiseCastingHook",
        "layerwise_casting.PeftInputAutocastDisableHook",
        "group_offloading.GroupOffloadingHook",
        "group_offloading.LazyPrefetchGroupOffloadingHook",
        "group_offloading.LayerExecutionTrackerHook",
    )
)


def refuse_context_parallel(transformer: nn.Module) -> None:
    """Raise UserError if diffusers' own context parallel splits what a method attends to."""
    if getattr(transformer, "_parallel_config", None) is not None:
        raise UserError(
            "the transformer already has diffusers' context parallel, which cannot be combined with a method"
        )


def _refuse_caches_of_one_rank(transformer: nn.Module) -> None:
    """Raise UserError for a hook of diffusers that may be unsafe over ranks; asked in each forward, as one may be added later."""
    registries = [module._diffusers_hook for module in transformer.modules() if hasattr(module, "_diffusers_hook")]
    kinds = {type(hook) for registry in registries for hook in registry.hooks.values()}
    unknown = sorted(kind.__name__ for kind in kinds if f"{kind.__module__}.{kind.__qualname__}" not in _SAFE_HOOKS)
    if unknown:
        config = getattr(transformer, "_cache_config", None)
        name = ", ".join(unknown) if config is None else type(config).__name__.removesuffix("Config")
        raise UserError(
            f"{name}: not known to decide the same on every rank; by one rank's tokens it would skip blocks in which others wait "
            "for it. Call transformer.disable_cache(), or use one rank"
        )


def shard_hooks(state: RunState, transformer: nn.Module) -> list[RemovableHandle]:
    """Give this rank its tokens after patch embedding and rotary table, and all ranks all tokens after the projection."""

    def share_embedding(_module: nn.Module, _args: tuple, embedded: Tensor) -> Tensor:
        shard = state.layout.shard
        return state.adapter.shard_embedding(embedded, shard[0], length(shard))

    def share_rotary(_module: nn.Module, _args: tuple, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        shard = state.layout.shard
        return state.adapter.shard_rotary(tables, shard[0], length(shard))

    def gather_output(_module: nn.Module, _args: tuple, projected: Tensor) -> Tensor:
        return state.layout.gather_tokens(projected)

    embedding, rotary, output = state.adapter.shard_points(transformer)
    return [
        embedding.register_forward_hook(share_embedding),
        rotary.register_forward_hook(share_rotary),
        output.register_forward_hook(gather_output),
    ]
