"""What is installed on a frozen transformer: a processor on every attn1, hooks that find the step, and hooks that shard tokens."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engine.adapters import ModelAdapter
from engine.denoise.denoise import check_finite
from engine.devices import wait_for
from engine.errors import UserError
from engine.hooks.in_force import Uncopyable, refuse_caches_of_one_rank, skips_layers
from engine.kernel_choice import SolverChoice, choose_for_pipeline, choose_solver
from engine.spectra.trace import SpectralTrace
from freespec.attention import WindowedAttention
from freespec.kernels import select_complement, select_dual, select_kernel
from freespec.methods import Branches, Grid, Layer, Method, Mode, StepPlan
from freespec.riflex import Riflex, lowered_frequency
from freespec.rotary import with_frequency
from freespec.scenes import ScenedAttention
from parallel.attention import HeadExchange, HybridAttention, SequenceLayout
from parallel.collectives import ignore_bytes
from parallel.mesh import SeqMesh
from parallel.shards import LayerShape, SequencePlan, choose_local_route, length

NO_FORWARD = (
    "was called without the hooks of its transformer: they were removed, or a part of it was called by hand; call the handle's "
    "remove(), then apply_method again"
)


@dataclass
class RunState(Uncopyable):
    """What every attn1 of one transformer shares. The root hook writes it before each forward; processors only read.

    The processors read strings and tensors, not numbers: a compiled block is compiled once per mode, not once per step.
    `attention_layout` is None between forwards, so that no block runs on what is left of the last one.
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
    scenes: tuple[int, ...] = ()  # frames after the first at which windows end and begin, of a timeline
    attention: WindowedAttention | ScenedAttention | None = None
    layout: SequenceLayout | None = None
    attention_layout: SequenceLayout | None = None
    step: int = 0
    layer: int = 0
    num_steps: int = 0
    checks_finite: bool = True  # False where the loop around the transformer looks at each step's latents
    trace: SpectralTrace | None = None
    eigensolver: SolverChoice | None = None  # None until the device is known

    @property
    def windows(self) -> WindowedAttention:
        """The windows of this forward, without the ends of scenes."""
        return self.attention.video if isinstance(self.attention, ScenedAttention) else self.attention

    def __str__(self) -> str:
        """Where the run is, as the errors of collectives say it."""
        return f"step {self.step} layer {self.layer}"


class BranchProcessor(Uncopyable):
    """Attention processor of one attn1: the step's branches and their fusion in place of full attention.

    Attributes:
        called: whether this forward has called it; set to False before each.
    """

    def __init__(self, state: RunState, layer: int) -> None:
        self.state = state
        self.layer = layer
        self.called = False

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
        self.called = True
        layout = state.attention_layout
        if layout is None:
            raise UserError(f"layer {self.layer} {NO_FORWARD}")
        if state.hybrid is not None:  # only with the method direct, whose steps are all global
            out = state.hybrid(*state.adapter.qkv(attn, hidden_states, rotary_emb), layout=layout)
            return state.adapter.project_out(attn, out)
        q, k, v = self._scatter(attn, hidden_states, rotary_emb, layout)
        if state.trace is not None:
            state.trace.observe(self.layer, state.step, (q, k, v), state.windows, layout)
        branches = self._branches(q, k, v, layout)
        if state.mode in ("global", "local"):
            out = branches.o_global if state.mode == "global" else branches.o_local
        else:
            layer = Layer(grid=state.grid, sum_tokens=layout.reduce, sum_heads=layout.sum_heads)
            out = state.method.fuse(branches, state.weights, layer)
        if state.trace is not None:
            local = out if state.mode == "views" else branches.o_local  # the views as one are a local branch
            state.trace.record(self.layer, state.step, (local, branches.o_global), state.weights, layout)
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
            local, o_global = layout.branches(q, k, v, state.mode, state.attention)
            return Branches(o_local=local, o_global=o_global)
        o_global = None
        if state.mode == "views_global":
            scaled = q * state.method.query_scale(state.grid)
            o_global = layout.branches(scaled, k, v, "global", state.attention)[1]
        views = state.attention.views(q, k, v, state.method.view_starts(state.grid))
        return Branches(o_global=o_global, views=views)


class StepHook(Uncopyable):
    """Forward hooks of the transformer: before, find the step, the grid and the mode; after, see that every layer ran.

    Args:
        state: written before each forward.
        scheduler: returns the pipeline's scheduler of this moment.
        before_forward: raises UserError unless the method is in force.
        processors: those of the self-attentions.
    """

    def __init__(
        self,
        state: RunState,
        scheduler: Callable[[], Any],
        *,
        before_forward: Callable[[], None] = lambda: None,
        processors: Sequence[BranchProcessor] = (),
    ) -> None:
        self.state = state
        self._scheduler = scheduler
        self._before_forward = before_forward
        self._processors = processors
        self._read: tuple[Tensor, int | None] | None = None
        self._timesteps: list[float] = []
        self._plan: list[StepPlan] = []
        self._made_for: tuple[int, Grid, torch.device] | None = None
        self._steps: list[int] = []  # of this run, in order
        self._complete: object = None  # the `_path` with which a forward of this run has called every layer
        self._in_call = False
        self._kernels: dict[tuple[torch.device, torch.dtype], str] = {}

    # Compiled with the rest of a transformer, the hooks would be traced: they read numbers off tensors, and decide by them.
    @torch.compiler.disable
    def __call__(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Fill the state for this forward."""
        self._before_forward()
        inputs = bind_forward(transformer, args, kwargs)
        latents, timestep = inputs["hidden_states"], inputs["timestep"]
        state = self.state
        if state.mesh.world.size > 1:
            refuse_caches_of_one_rank(transformer)
        state.step = self._find_step(_one_per_batch(timestep))
        self._note(state.step)
        state.num_steps = len(self._timesteps)
        if state.checks_finite:
            refuse_not_finite(state, latents, "before")
        frames, rows, columns = state.adapter.grid(transformer, inputs)
        state.grid = Grid(frames=frames, rows=rows, columns=columns, window_frames=state.window_frames)
        head_dim = transformer.config.attention_head_dim
        attention = WindowedAttention(
            num_frames=frames,
            frame_tokens=state.grid.frame_tokens,
            window_frames=state.window_frames,
            kernel=select_kernel(self._kernel_name(latents, head_dim), latents.device, latents.dtype),
            dual_kernel=select_dual(state.dual_name, latents.device, latents.dtype),
            rest_kernel=select_complement(state.complement_name, latents.device, latents.dtype, dual=state.dual_name),
        )
        state.attention = ScenedAttention(video=attention, starts=(0, *state.scenes)) if state.scenes else attention
        step = self._plan[state.step]
        # At native length both branches are the whole video, and the stock computation is kept bit for bit.
        state.mode = "global" if frames <= state.window_frames else step.mode
        self._lay_out(state.grid.tokens, transformer.config.num_attention_heads, head_dim, latents)
        if state.eigensolver is None:  # of a pipeline of one's own; an engine chooses when it starts
            choose_eigensolver(state, transformer, latents.device)
        fuses = state.mode not in ("global", "local")
        made_for = (state.step, state.grid, latents.device) if fuses else None
        # Once a step: making them copies numbers to the device, which waits for the pass before.
        if made_for != self._made_for:
            state.weights = state.method.weights(step, state.grid, head_dim, latents.device) if fuses else None
            self._made_for = made_for
        for processor in self._processors:
            processor.called = False

    @torch.compiler.disable
    def after(self, transformer: nn.Module, _args: tuple, output: Any) -> None:
        """Close the state; raise UserError for a prediction that is not finite, or if the method was not in every layer.

        After the last step no further forward would see what a prediction made of the latents. Caches skip layers, but none
        does in the first forward of a run or after it was enabled, and what has called every layer there may skip some later.
        """
        state = self.state
        state.attention_layout = None
        if state.checks_finite:
            refuse_not_finite(state, output[0], "after")
        missing = [processor.layer for processor in self._processors if not processor.called]
        path = self._path(transformer)
        if missing and path != self._complete and not skips_layers(transformer):
            raise UserError(
                f"the attention of {len(missing)} of {len(self._processors)} layers (the first is {missing[0]}) was computed without the "
                "method: the forward of the transformer, a block or an attention was replaced; undo that, or call the handle's remove()"
            )
        self._complete = path

    def begin_call(self) -> None:
        """The pipeline is called."""
        self._in_call = True
        self._begin_run()

    def end_call(self) -> None:
        """The call has ended, well or not; after an error in a forward `after` was not called."""
        self._in_call = False
        self.state.attention_layout = None

    def check_call(self, *, interrupted: bool) -> None:
        """Raise UserError unless the transformer was called in every step of this call; a pipeline may begin in the middle."""
        steps, total = self._steps, len(self._timesteps)
        if not interrupted and (not steps or steps != list(range(steps[0], total))):
            raise UserError(
                f"the transformer with the method was called in {len(steps)} of the {total} steps of this call: another was in its place "
                "for the others; leave pipe.transformer alone until the call ends"
            )

    def _path(self, transformer: nn.Module) -> list[tuple[nn.Module, Any, Any]]:
        """The modules through which the processors are called, and the forward of each: its own, if it has one, and its class's."""
        blocks = self.state.adapter.blocks(transformer)
        modules = [transformer, *blocks, *(block.attn1 for block in blocks)]
        return [(module, vars(module).get("forward"), type(module).forward) for module in modules]

    def _begin_run(self) -> None:
        self._steps, self._complete = [], None

    def _note(self, step: int) -> None:
        """Add a step to those of this run, or begin another run."""
        if self._steps and step < self._steps[-1]:
            self._begin_run()
        if step not in self._steps[-1:]:
            self._steps.append(step)

    def _kernel_name(self, latents: Tensor, head_dim: int) -> str:
        """The kernel setting; `auto` on a pipeline of one's own (an engine has chosen) is tried out at the first long video."""
        state, where = self.state, (latents.device, latents.dtype)
        if state.kernel_name != "auto" or state.hybrid is not None or state.grid.frames <= state.window_frames:
            return state.kernel_name
        if where not in self._kernels:
            self._kernels[where] = choose_for_pipeline(state.mesh, state.grid, head_dim=head_dim, where=where)
        return self._kernels[where]

    def _find_step(self, timestep: Tensor) -> int:
        """Index of this forward in the scheduler's timesteps; UserError if the forward belongs to another step."""
        scheduler = self._scheduler()
        if getattr(scheduler, "num_inference_steps", None) is None:  # its timesteps are those of training
            raise UserError(f"the transformer was called before its scheduler's set_timesteps: {self._whose()}")
        self._read_timesteps(scheduler.timesteps)
        timesteps, value = self._timesteps, self._value(timestep, scheduler.timesteps)
        step = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
        if step >= len(timesteps) or timesteps[step] != value:
            raise UserError(
                f"the transformer was called at timestep {value}, but its scheduler stands at step {step} of {len(timesteps)}: "
                f"{self._whose()}"
            )
        return step

    def _whose(self) -> str:
        """Who called the transformer at a step that is not its scheduler's."""
        if self._in_call:
            return "the scheduler was replaced or set anew during a call; leave it alone until the call ends"
        return (
            "another pipeline shares this transformer, or it was called by hand; call it through the pipeline that the method was "
            "applied to, which sets the scheduler, or call the handle's remove() first"
        )

    def _read_timesteps(self, timesteps: Tensor) -> None:
        """Copy them to Python once for each tensor: on a GPU the copy waits for all that is queued there.

        Tensors made under inference_mode do not count their changes, and are copied in each step.
        """
        version = None if timesteps.is_inference() else timesteps._version
        if version is not None and self._read is not None and self._read[0] is timesteps and self._read[1] == version:
            return
        self._read = timesteps, version
        values = [float(t) for t in timesteps.tolist()]
        if values != self._timesteps:
            self._timesteps, self._plan, self._made_for = values, self.state.method.plan(values), None
            self._begin_run()

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


def _one_per_batch(timestep: Tensor) -> Tensor:
    """The timestep, if it is one number for all videos of a batch. One that is expanded needs no reading, which waits for a GPU."""
    if timestep.dim() == 1 and (len(timestep) == 1 or timestep.stride() == (0,) or len(set(timestep.tolist())) == 1):
        return timestep
    raise UserError(
        f"expected one timestep per video, the same for a whole batch, got a tensor of shape {tuple(timestep.shape)}; if an image- or "
        "video-to-video pipeline shares this transformer, call the handle's remove() first"
    )


def refuse_not_finite(state: RunState, latents: Tensor, when: str) -> None:
    """Raise UserError for latents or predictions with NaN or infinity, on all ranks together, as all have the same ones."""
    wait_for(latents.device)  # reading them waits for the device in C, where no signal is heard
    check_finite(
        latents,
        where=f"{when} the transformer of step {state.step + 1} of {state.num_steps} in {str(latents.dtype).removeprefix('torch.')}",
        remedy="load the pipeline in another dtype, take a lower guidance_scale, or fetch the weights again",
    )


@functools.cache
def _signature(transformer_class: type[nn.Module]) -> inspect.Signature:
    """Names of the arguments of a forward; asked of the class, as offload puts another function on the instance."""
    return inspect.signature(transformer_class.forward)


def bind_forward(transformer: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a forward by name."""
    return _signature(type(transformer)).bind(transformer, *args, **kwargs).arguments


class TokenHooks(Uncopyable):
    """Forward hooks where tokens are made: this rank's tokens after patch embedding and rotary table, all after the projection.

    Attributes:
        registered: the hooks, on the modules that have these names now.
    """

    def __init__(self, state: RunState, transformer: nn.Module, riflex: Riflex | None = None) -> None:
        self._state = state
        self._transformer = transformer
        self._riflex = riflex if riflex is not None and riflex.enabled else None
        self._points: tuple[nn.Module, ...] = ()
        self._pairs: list[tuple[float, slice]] = []  # temporal frequencies, if one is to be lowered
        self.registered: list[RemovableHandle] = []
        self.follow()

    def follow(self) -> None:
        """Move the hooks to modules that took the place of others, such as a LoRA around a projection."""
        points = self._state.adapter.shard_points(self._transformer)
        if self._points and all(now is before for now, before in zip(points, self._points, strict=True)):
            return
        self.remove()
        self._points = embedding, rotary, output = points
        lower = []
        if self._riflex is not None:
            self._pairs = self._state.adapter.temporal_frequencies(self._transformer)  # here, as it waits for a GPU
            # A table is lowered whole, before ranks take their rows of it.
            lower = [rotary.register_forward_hook(self.lower_frequency)]
        self.registered = [
            *lower,
            embedding.register_forward_hook(self.shard_embedding),
            rotary.register_forward_hook(self.shard_rotary),
            output.register_forward_hook(self.gather_output),
        ]

    def remove(self) -> None:
        """Take the hooks off, copies of them too: torch's quantization puts a module's hooks on the one that takes its place."""
        for module in self._transformer.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del module._forward_hooks[key]
        self.registered = []

    @property
    def _layout(self) -> SequenceLayout:
        if self._state.attention_layout is None:
            raise UserError(f"a part of the transformer {NO_FORWARD}")
        return self._state.layout

    @torch.compiler.disable
    def lower_frequency(self, _module: nn.Module, _args: tuple, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Lower one temporal frequency of the rotary table of a long video (freespec.riflex)."""
        grid, frequencies = self._state.grid, [frequency for frequency, _ in self._pairs]
        change = lowered_frequency(self._riflex, frequencies, num_frames=grid.frames, window_frames=grid.window_frames)
        if change is None:
            return tables
        pair, frequency = change
        return with_frequency(tables, frequency, columns=self._pairs[pair][1], frame_tokens=grid.frame_tokens)

    @torch.compiler.disable
    def shard_embedding(self, _module: nn.Module, _args: tuple, embedded: Tensor) -> Tensor:
        """This rank's tokens of all."""
        shard = self._layout.shard
        return self._state.adapter.shard_embedding(embedded, shard[0], length(shard))

    @torch.compiler.disable
    def shard_rotary(self, _module: nn.Module, _args: tuple, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """This rank's rows of the rotary tables."""
        shard = self._layout.shard
        return self._state.adapter.shard_rotary(tables, shard[0], length(shard))

    @torch.compiler.disable
    def gather_output(self, _module: nn.Module, _args: tuple, projected: Tensor) -> Tensor:
        """All tokens, of the ranks' own."""
        return self._layout.gather_tokens(projected)
