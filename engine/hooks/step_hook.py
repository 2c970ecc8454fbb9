"""Forward hooks of the transformers: find the step, its grid and mode before a forward; check afterwards that every layer ran."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.devices import wait_for
from engine.errors import UserError, as_user_error, check_finite
from engine.hooks.in_force import Uncopyable, refuse_caches_of_one_rank, skips_layers
from engine.hooks.self_attention import BranchProcessor
from engine.hooks.state import Forward, RunState
from engine.hooks.step_cache import forget_steps
from engine.kernel_choice import choose_for_pipeline, choose_solver, select_kernels
from freespec.attention import WindowedAttention, table_of
from freespec.far_keys import far_tokens
from freespec.methods import Grid, Mode, StepPlan
from freespec.scenes import ScenedAttention
from freespec.thinning import kept_tokens
from freespec.tiers import table_of as tiers_table
from parallel.attention import TORCH_EXCHANGE, KeptTokens, SequenceLayout
from parallel.collectives import ignore_bytes
from parallel.shards import (
    HaloRange,
    LayerShape,
    SequencePlan,
    choose_local_route,
    length,
    refuse_uneven,
    token_unit,
)


class StepHook(Uncopyable):
    """Forward hooks of the transformer: find the step, grid and mode before a forward; check afterwards that every layer ran.

    Args:
        state: written before each forward.
        scheduler: returns the pipeline's current scheduler.
        before_forward: raises UserError unless the method is in force.
        active: returns the transformer that denoises a timestep.
        processors: those of the self-attentions of each transformer.
    """

    def __init__(
        self,
        state: RunState,
        scheduler: Callable[[], Any],
        *,
        before_forward: Callable[[], None],
        active: Callable[[float], Any],
        processors: Mapping[Any, Sequence[BranchProcessor]],
    ) -> None:
        self.state = state
        self._scheduler = scheduler
        self._before_forward = before_forward
        self._active = active
        self._processors = processors
        self._read: tuple[Tensor, int | None] | None = None
        self._timesteps: list[float] = []
        self._plan: list[StepPlan] = []
        self._made_for: tuple[int, Grid, torch.device] | None = None
        self._made: Any = None  # the fusion weights
        self._frames_for: tuple[StepPlan, Grid] | None = None
        self._frame_sets: tuple[Tensor, ...] = ()
        self._tiers_for: tuple[Grid, int] | None = None
        self._tier_tables: Sequence[Tensor | None] = ()
        self._kept_for: tuple[int, Grid, torch.device] | None = None
        self._kept_tokens: list[KeptTokens] = []
        self._steps: list[int] = []  # of this run, in order
        # the `_path` with which a forward of this run has called every layer of a transformer
        self._complete: dict[Any, object] = {}
        self._last: tuple[Any, Mode] | None = None
        self._in_call = False
        self._kernels: dict[tuple[torch.device, torch.dtype], str] = {}

    # Not traced when a transformer is compiled: the hooks read numbers from tensors and branch on them.
    @torch.compiler.disable
    def __call__(self, transformer: Any, args: tuple, kwargs: dict) -> None:
        """Fill the state for this forward."""
        self._before_forward()
        inputs = bind_forward(transformer, args, kwargs)
        latents, timestep = inputs["hidden_states"], inputs["timestep"]
        state, setup = self.state, self.state.setup
        if setup.mesh.world.size > 1:
            refuse_caches_of_one_rank(transformer)
        step = self._find_step(_one_per_batch(setup.adapter.video_timestep(timestep)))
        if self._active(self._timesteps[step]) is not transformer:
            raise UserError(
                f"timestep {self._timesteps[step]:g} is for the other of the two transformers, by boundary_ratio; call the transformers "
                "through the pipeline, which chooses"
            )
        self._note(step)
        if state.checks_finite:
            refuse_not_finite(latents, f"before the transformer of step {step + 1} of {len(self._timesteps)}")
        frames, rows, columns = setup.adapter.grid(transformer, inputs)
        grid = Grid(frames=frames, rows=rows, columns=columns, window_frames=setup.window_frames)
        plan = self._plan[step]
        # At native length both branches are the whole video, and the stock computation is kept bit for bit.
        mode = "global" if frames - len(state.beside) <= setup.window_frames else plan.mode
        if mode == "tiers" and state.beside:
            raise UserError(
                f"the positions of tiers count frames of the video, and {len(state.beside)} pictures stand between those; give pictures "
                "at the first frame alone, or choose another method"
            )
        if (transformer, mode) != self._last:  # what a cache kept of a dual step is not that of a local one
            for each in self._processors:
                forget_steps(each)
            self._last = transformer, mode
        attention = self._attention(transformer, grid, latents)
        layout, attention_layout = share_tokens(
            state, transformer.config, grid.tokens, latents=latents, mode=mode, halo=attention.halo
        )
        if state.eigensolver is None:  # on a user's pipeline; an engine chooses when it starts
            choose_eigensolver(state, transformer, latents.device)
        processors = self._processors[transformer]
        every_kept = self._kept(grid, mode, step, attention_layout, latents.device, layers=len(processors))
        every_tiers = self._tiers(grid, len(processors)) if mode == "tiers" else [None] * len(processors)
        for processor, kept, tiers in zip(processors, every_kept, every_tiers, strict=True):
            processor.called, processor.kept, processor.tiers = False, kept, tiers
        state.forward = Forward(
            step=step,
            num_steps=len(self._timesteps),
            grid=grid,
            mode=mode,
            attention=attention,
            layout=layout,
            attention_layout=attention_layout,
            weights=None
            if mode in ("global", "local")
            else self._weights(plan, grid, step, transformer, latents.device),
            frames=self._frames(plan, grid) if mode == "frames" else (),
        )
        state.running = True

    @torch.compiler.disable
    def after(self, transformer: Any, _args: tuple, output: Any) -> None:
        """End the forward; raise UserError for a prediction that is not finite, or a layer without the method.

        Predictions are checked as well as latents, since no further forward follows the last step. Caches skip layers, but
        never in the first forward of a run or after being enabled, so a path that has called every layer once may skip some.
        """
        state = self.state
        state.running = False
        if state.checks_finite:
            step = f"step {state.last.step + 1} of {state.last.num_steps}"
            refuse_not_finite(output[0], f"after the transformer of {step}")
        processors = self._processors[transformer]
        missing = [processor.layer for processor in processors if not processor.called]
        path = self._path(transformer)
        if missing and path != self._complete.get(transformer) and not skips_layers(transformer):
            raise UserError(
                f"the attention of {len(missing)} of {len(processors)} layers (the first is {missing[0]}) was computed without the "
                "method: the forward of the transformer, a block or an attention was replaced; undo that, or call the handle's remove()"
            )
        state.last.cached = bool(missing)
        self._complete[transformer] = path

    def begin_call(self) -> None:
        """Begin a call of the pipeline."""
        self._in_call = True
        self._begin_run()

    def end_call(self) -> None:
        """End a call of the pipeline, also after an error, for which `after` is not called."""
        self._in_call = False
        self.state.running = False

    def check_call(self, *, interrupted: bool) -> None:
        """Raise UserError unless the transformer was called in every step of this call, from any first step on."""
        steps, total = self._steps, len(self._timesteps)
        if not interrupted and (not steps or steps != list(range(steps[0], total))):
            raise UserError(
                f"the transformer with the method was called in {len(steps)} of the {total} steps of this call: another was in its place "
                "for the others; leave pipe.transformer alone until the call ends"
            )

    def _path(self, transformer: Any) -> list[tuple[Any, Any, Any]]:
        """The modules that lead to the processors, and the forward of each: of the instance, if set, and of its class."""
        blocks = self.state.setup.adapter.blocks(transformer)
        modules = [transformer, *blocks, *(block.attn1 for block in blocks)]
        return [(module, vars(module).get("forward"), type(module).forward) for module in modules]

    def _begin_run(self) -> None:
        self._steps, self._complete, self._last = [], {}, None

    def _note(self, step: int) -> None:
        """Add a step to this run, or begin another run."""
        if self._steps and step < self._steps[-1]:
            self._begin_run()
        if step not in self._steps[-1:]:
            self._steps.append(step)

    def _attention(self, transformer: Any, grid: Grid, latents: Tensor) -> WindowedAttention | ScenedAttention:
        """The windows of this video, with the kernels for its device and dtype."""
        setup, where = self.state.setup, (latents.device, latents.dtype)
        name = self._kernel_name(grid, transformer.config.attention_head_dim, where)
        kernels = select_kernels(*where, kernel=name, dual=setup.dual, complement=setup.complement)
        if setup.method.rest_kernel is not None:
            kernels |= {"rest_kernel": setup.method.rest_kernel}
        attention = WindowedAttention(
            num_frames=grid.frames,
            frame_tokens=grid.frame_tokens,
            window_frames=grid.window_frames,
            **kernels,
        )
        scenes = self.state.scenes
        return ScenedAttention(video=attention, starts=(0, *scenes)) if scenes else attention

    def _kernel_name(self, grid: Grid, head_dim: int, where: tuple[torch.device, torch.dtype]) -> str:
        """The kernel setting; `auto` on a user's pipeline is resolved at the first long video (an engine has resolved it)."""
        setup = self.state.setup
        if setup.kernel != "auto" or setup.hybrid is not None or grid.frames <= grid.window_frames:
            return setup.kernel
        if where not in self._kernels:
            self._kernels[where] = choose_for_pipeline(setup.mesh, grid, head_dim=head_dim, where=where)
        return self._kernels[where]

    def _weights(self, plan: StepPlan, grid: Grid, step: int, transformer: Any, device: torch.device) -> Any:
        """The fusion weights, made once a step, since making them copies numbers to the device and blocks."""
        made_for = (step, grid, device)
        if made_for != self._made_for:
            self._made = self.state.setup.method.weights(plan, grid, transformer.config.attention_head_dim, device)
            self._made_for = made_for
        return self._made

    def _frames(self, plan: StepPlan, grid: Grid) -> tuple[Tensor, ...]:
        """The frames that each frame sees in each branch, made once a step; on the CPU, where their numbers are read."""
        if self._frames_for != (plan, grid):
            self._frame_sets = tuple(table_of(each) for each in self.state.setup.method.frame_sets(plan, grid))
            self._frames_for = plan, grid
        return self._frame_sets

    def _tiers(self, grid: Grid, layers: int) -> Sequence[Tensor | None]:
        """The tiers of each layer, made once a video; on the CPU, where their numbers are read."""
        if self._tiers_for != (grid, layers):
            named = self.state.setup.method.tiers(grid, layers)
            tables = {tiers: tiers_table(tiers) for tiers in dict.fromkeys(named)}
            self._tier_tables, self._tiers_for = [tables[tiers] for tiers in named], (grid, layers)
        return self._tier_tables

    def _kept(
        self, grid: Grid, mode: Mode, step: int, layout: SequenceLayout, device: torch.device, *, layers: int
    ) -> Sequence[KeptTokens | None]:
        """The keys outside the windows that each layer attends to in this step, made once a step; None for all of them."""
        setup = self.state.setup
        with as_user_error():
            kept = far_tokens(
                setup.far,
                num_frames=grid.frames,
                frame_tokens=grid.frame_tokens,
                window_frames=grid.window_frames,
            )
        if kept is None or mode != "dual":
            return [None] * layers
        kept_for = (step, grid, device)
        if kept_for != self._kept_for:
            table = kept_tokens(grid.rows, grid.columns, num_frames=grid.frames, kept=kept, layers=layers, step=step)
            starts = [start for start, _ in layout.plan.ring_shards]
            cuts = torch.searchsorted(table, torch.tensor([*starts, grid.tokens]).expand(layers, -1).contiguous())
            self._kept_tokens = [
                KeptTokens(index=index, cuts=tuple(ends))
                for index, ends in zip(table.to(device), cuts.tolist(), strict=True)
            ]
            self._kept_for = kept_for
        return self._kept_tokens

    def _find_step(self, timestep: Tensor) -> int:
        """Index of this forward in the scheduler's timesteps; UserError if the forward belongs to another step."""
        scheduler = self._scheduler()
        if getattr(scheduler, "num_inference_steps", None) is None:  # its timesteps are still those of training
            raise UserError(f"the transformer was called before its scheduler's set_timesteps: {self._likely_cause()}")
        self._read_timesteps(scheduler.timesteps)
        timesteps, value = self._timesteps, self._value(timestep, scheduler.timesteps)
        step = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
        if step >= len(timesteps) or timesteps[step] != value:
            raise UserError(
                f"the transformer was called at timestep {value}, but its scheduler stands at step {step} of {len(timesteps)}: "
                f"{self._likely_cause()}"
            )
        return step

    def _likely_cause(self) -> str:
        """Describe the likely cause of a call at another step than the scheduler's, with advice."""
        if self._in_call:
            return "the scheduler was replaced or reset during a call; leave it alone until the call ends"
        return (
            "another pipeline shares this transformer, or it was called by hand; call it through the pipeline that the method was "
            "applied to, which sets the scheduler, or call the handle's remove() first"
        )

    def _read_timesteps(self, timesteps: Tensor) -> None:
        """Copy timesteps to Python once per tensor, since on a GPU the copy waits for all queued work.

        Tensors made under inference_mode have no version counter, and are copied in each step.
        """
        version = None if timesteps.is_inference() else timesteps._version
        if version is not None and self._read is not None and self._read[0] is timesteps and self._read[1] == version:
            return
        self._read = timesteps, version
        values = [float(t) for t in timesteps.tolist()]
        if values != self._timesteps:
            self._timesteps, self._plan, self._made_for = values, self.state.setup.method.plan(values), None
            self._begin_run()

    def _value(self, timestep: Tensor, timesteps: Tensor) -> float:
        """The number in `timestep`, without reading the tensor if it is a view of the scheduler's, as pipelines pass it."""
        whole = timesteps if timesteps._base is None else timesteps._base
        at = timestep.storage_offset() - timesteps.storage_offset()
        same = timestep._base is whole and timestep.dtype == timesteps.dtype
        if same and timesteps.is_contiguous() and 0 <= at < len(self._timesteps):
            return self._timesteps[at]
        return float(timestep[0])


def choose_eigensolver(state: RunState, transformer: Any, device: torch.device) -> None:
    """Choose the eigensolver for the Gram matrices of a layer's two branches; on a CPU it is LAPACK.

    Raises UserError, on all ranks together, if a rank's device has no correct solver.
    """
    if device.type == "cpu":
        return
    config, mesh = transformer.config, state.setup.mesh
    heads = -(-config.num_attention_heads // mesh.ulysses.size)
    passes = 2 if state.setup.adapter.batches_guidance and mesh.cfg.size == 1 else 1
    share = -(-passes * heads // mesh.ring.size)
    state.eigensolver = choose_solver(mesh, num_matrices=2 * share, rows=config.attention_head_dim, device=device)


def _one_per_batch(timestep: Tensor) -> Tensor:
    """Return the timestep if it is equal for all videos of a batch; an expanded tensor is not read, which would block on a GPU."""
    if timestep.dim() == 1 and (len(timestep) == 1 or timestep.stride() == (0,) or len(set(timestep.tolist())) == 1):
        return timestep
    raise UserError(
        f"expected one timestep per video, the same for a whole batch, got a tensor of shape {tuple(timestep.shape)}; if an image- or "
        "video-to-video pipeline shares this transformer, call the handle's remove() first"
    )


def refuse_not_finite(latents: Tensor, where: str) -> None:
    """Raise UserError for latents or predictions with NaN or infinity, on all ranks together, as all hold the same."""
    wait_for(latents.device)  # reading them would block in C, where no signal is handled
    check_finite(
        latents,
        where=f"{where} in {str(latents.dtype).removeprefix('torch.')}",
        remedy="load the pipeline in another dtype, take a lower guidance_scale, or fetch the weights again",
    )


@functools.cache
def _signature(transformer_class: Any) -> inspect.Signature:
    """The signature of a forward, from the class, since offload puts another function on the instance."""
    return inspect.signature(transformer_class.forward)


def bind_forward(transformer: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a forward by name."""
    kind: Any = type(transformer)
    return _signature(kind).bind(transformer, *args, **kwargs).arguments


def gathers_keys(device: torch.device) -> bool:
    """Whether keys are gathered along the ring: on a CPU, where that gives the bits of one rank. A GPU hides a ring's messages."""
    return device.type == "cpu"


def share_tokens(
    state: RunState, model: Any, num_tokens: int, *, latents: Tensor, mode: Mode, halo: HaloRange
) -> tuple[SequenceLayout, SequenceLayout]:
    """Return the layout of a video's tokens over the ranks, and the one for the attention of a mode with windows of this `halo`.

    `model` is the transformer's configuration.
    """
    setup, mesh = state.setup, state.setup.mesh
    if num_tokens < mesh.sequence.size:
        raise UserError(
            f"cannot split {num_tokens} tokens over {mesh.sequence.size} ranks; use fewer ranks or a larger video"
        )
    heads = model.num_attention_heads
    even = setup.hybrid is not None or setup.exchange is not TORCH_EXCHANGE
    unit = token_unit(num_tokens, mesh.sequence.size, even=even)
    plan = SequencePlan(tokens=num_tokens, heads=heads, ring=mesh.ring.size, ulysses=mesh.ulysses.size, unit=unit)
    if even and state.beside:  # all others were counted when the ranks were arranged
        try:
            refuse_uneven(
                "parallel.provider deepspeed or xfuser",
                [length(x) for x in plan.shards],
                [length(x) for x in plan.head_shares],
            )
        except ValueError as error:
            raise UserError(
                f"{error}; the tokens of pictures at later frames than the first ({len(state.beside)}) count too: use parallel.provider "
                "torch, another number of such pictures, or fewer ranks"
            ) from error
    trace = mesh.trace(state, ignore_bytes)
    layout = SequenceLayout(
        mesh=mesh, plan=plan, exchange=setup.exchange, trace=trace, gathers_keys=gathers_keys(latents.device)
    )
    route = setup.local_route
    if mode == "local" and route == "auto":
        shape = LayerShape(batch=latents.shape[0], head_dim=model.attention_head_dim, itemsize=latents.element_size())
        route = choose_local_route(plan, shape=shape, halo=halo)
    by_halo = mode == "local" and route == "halo"
    return layout, layout.on_shards() if by_halo else layout
