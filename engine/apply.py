"""`apply_method`: a method for long videos on a user's own pipeline, in one line, and taken off again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.adapters import ModelAdapter, adapter_of
from engine.errors import UserError
from engine.group_of_one import GROUP_OF_ONE
from engine.hooks import (
    BranchProcessor,
    RunState,
    StepHook,
    finite_hook,
    refuse_context_parallel,
    riflex_hook,
    shard_hooks,
)
from engine.supported_layouts import Degrees, check_layout
from freespec.kernels import select_complement, select_dual, select_kernel
from freespec.methods import Direct, Method, make_method
from freespec.riflex import Riflex, lowered_frequency
from parallel.attention import TORCH_EXCHANGE, HeadExchange, HybridAttention
from parallel.mesh import SeqMesh


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How a process shares one video with others.

    Attributes:
        mesh: cfg x ring x ulysses, from `parallel.mesh.build_mesh`. A pipeline's own loop runs both passes of guidance in
            every rank, so cfg must be 1 there; `LongVideoEngine` uses the axis.
        local_route: how local steps cross the ulysses axis: `halo`, `all_to_all`, or `auto` for fewer bytes.
        exchange: who exchanges heads against tokens.
        hybrid: who computes the whole of `direct` over the ranks instead, exchange included; None is nobody.
        why: the reason for these degrees, for the record.
        nodes: name of the node of each rank, for the record.
    """

    mesh: SeqMesh
    local_route: str = "auto"
    exchange: HeadExchange = TORCH_EXCHANGE
    hybrid: HybridAttention | None = None
    why: str = "given"
    nodes: tuple[str, ...] = ()

    @property
    def degrees(self) -> Degrees:
        """cfg, ring, ulysses."""
        return self.mesh.cfg.size, self.mesh.ring.size, self.mesh.ulysses.size


class MethodHandle:
    """A method that is on a pipeline; `remove()` takes it off and leaves the pipeline as it was, bit for bit."""

    def __init__(
        self, state: RunState, hooks: list[RemovableHandle], originals: list[tuple[nn.Module, Any]], alone: bool
    ) -> None:
        self.state = state
        self._hooks = hooks
        self._originals = originals
        self._alone = alone

    def remove(self) -> None:
        """Put the pipeline's own processors back; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for attn, processor in self._originals:
            attn.set_processor(processor)
        if self._alone:
            GROUP_OF_ONE.release()
        self._hooks, self._originals, self._alone = [], [], False

    def __enter__(self) -> "MethodHandle":
        """Use as a context manager that removes the method at its end."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove the method."""
        self.remove()


def apply_method(
    pipe: DiffusionPipeline,
    *,
    method: str | Method = "freespec",
    window_frames: int,
    kernel: str = "auto",
    dual: str = "auto",
    complement: str = "same",
    ranks: Ranks | None = None,
    riflex: Riflex | None = None,
    **settings: Any,
) -> MethodHandle:
    """Put a method for long videos on a pipeline: `handle = apply_method(pipe, method="freespec", window_frames=21)`.

    Args:
        pipe: a WanPipeline or an LTXPipeline (text-to-video), on any device, before or after `fuse_qkv_projections`,
            layerwise casting, CPU offload or `compile_repeated_blocks`.
        method: a name (direct, sliding_window, freenoise, freelong, freepca, freespec), a class as package.module:Class, or a
            method object.
        window_frames: latent frames that the local branch sees: the native length of the model, 21 for Wan2.1 and 16 for
            LTX-Video.
        kernel: dense attention kernel, see `freespec.kernels`; `auto` takes the one for the device and dtype.
        dual: how dual steps compute both branches: `strided`, `triton`, or `auto`, see `freespec.kernels.select_dual`.
        complement: what attends to the keys outside the windows in dual steps: `same` or `sage`, see
            `freespec.kernels.select_complement`.
        ranks: how this process shares the video's tokens with others; None is a process alone.
        riflex: lowers one temporal frequency of the rotary table; the default and `Riflex(enabled=False)` leave it alone.
        **settings: settings of the method, for example `alpha=3.0` for freespec.

    Raises:
        UserError: for a pipeline that the method cannot serve, an unknown method, kernel or setting. A call of the pipeline
            raises it for latents or predictions with NaN or infinity.
    """
    adapter = adapter_of(pipe)
    adapter.check_pipeline(pipe)
    adapter.check_scheduler(pipe.scheduler)
    transformer = pipe.transformer
    modules = adapter.attention_modules(transformer)
    _check_free(transformer, modules)
    if window_frames < 1:
        raise UserError(f"window_frames must be 1 or more, got {window_frames}")
    if settings and not isinstance(method, str):
        raise UserError("settings go with a method's name; a method object has its own")
    riflex = riflex or Riflex()
    check_riflex(adapter, riflex)
    try:
        made = make_method(method, **settings) if isinstance(method, str) else method
        made.check_window(window_frames)
        where = get_module_execution_device(transformer), transformer.dtype
        for select, name in ((select_kernel, kernel), (select_dual, dual)):
            select(name, *where)
        select_complement(complement, *where, dual=dual)
        if riflex.enabled:
            frequencies = [frequency for frequency, _ in adapter.temporal_frequencies(transformer)]
            lowered_frequency(riflex, frequencies, num_frames=1, window_frames=window_frames)  # raises if there is none
    except ValueError as error:
        raise UserError(str(error)) from error
    if ranks is not None:
        check_layout(method if isinstance(method, str) else type(made).__name__, made, ranks.degrees)
        if ranks.hybrid is not None and not isinstance(made, Direct):
            raise UserError(f"{type(ranks.hybrid).__name__} computes full attention only, which is the method direct")
    shared = ranks or Ranks(mesh=GROUP_OF_ONE.acquire())
    state = RunState(
        adapter=adapter,
        method=made,
        window_frames=window_frames,
        kernel_name=kernel,
        dual_name=dual,
        complement_name=complement,
        mesh=shared.mesh,
        exchange=shared.exchange,
        hybrid=shared.hybrid,
        local_route=shared.local_route,
    )
    # First of the hooks on the rotary table, since those of the ranks cut it.
    lowers = [riflex_hook(state, transformer, riflex)] if riflex.enabled else []
    originals = [(attn, attn.processor) for attn in modules]
    for layer, attn in enumerate(modules):
        attn.set_processor(BranchProcessor(state, layer))
    step_hook = transformer.register_forward_pre_hook(StepHook(state, lambda: pipe.scheduler), with_kwargs=True)
    hooks = [step_hook, *lowers, *shard_hooks(state, transformer), finite_hook(state, transformer)]
    return MethodHandle(state, hooks, originals, alone=ranks is None)


def check_riflex(adapter: ModelAdapter, riflex: Riflex) -> None:
    """Raise UserError if RIFLEx is asked of a model whose temporal positions do not count frames."""
    if riflex.enabled and not adapter.counts_frames:
        raise UserError(
            f"attention.riflex does nothing for {adapter.name}: its temporal positions are seconds within a range that longer "
            "videos stay in; set attention.riflex.enabled false"
        )


def check_shift(scheduler: Mapping[str, Any], shift: str) -> None:
    """Raise UserError if the shift of longer videos is asked of a checkpoint whose scheduler has one shift for any length.

    `scheduler` is the configuration of the checkpoint's scheduler.
    """
    if shift == "actual" and not scheduler.get("use_dynamic_shifting"):
        raise UserError(
            "sampler.shift actual does nothing for this checkpoint: its scheduler has one shift for any length; leave it out, or "
            "choose that shift with sampler.flow_shift"
        )


def _check_free(transformer: nn.Module, modules: list[nn.Module]) -> None:
    """Refuse what would be ignored or would make attention wrong without a word."""
    refuse_context_parallel(transformer)
    for attn in modules:
        if isinstance(attn.processor, BranchProcessor):
            raise UserError("the pipeline already has a method; call its handle's remove() first")
        backend = getattr(attn.processor, "_attention_backend", None)
        if backend is not None:
            raise UserError(
                f"attention backend {backend} is set on the transformer, and a method chooses its own kernel; "
                "call transformer.reset_attention_backend() and pass kernel=... instead"
            )
