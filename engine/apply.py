"""`apply_method`: a method for long videos on a user's own pipeline, in one line, and taken off again."""

from dataclasses import dataclass
from typing import Any

from diffusers import WanPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.adapters.wan import WanAdapter
from engine.errors import UserError
from engine.group_of_one import GROUP_OF_ONE
from engine.hooks import BranchProcessor, RunState, StepHook, shard_hooks
from freespec.kernels import select_kernel
from freespec.methods import Method, make_method
from parallel.attention import TORCH_EXCHANGE, HeadExchange
from parallel.mesh import SeqMesh


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How a process shares one video with others.

    Attributes:
        mesh: cfg x ring x ulysses, from `parallel.mesh.build_mesh`. A pipeline's own loop runs both passes of guidance in
            every rank, so cfg must be 1 there; `LongVideoEngine` uses the axis.
        local_route: how local steps cross the ulysses axis: `halo`, `all_to_all`, or `auto` for fewer bytes.
        exchange: who exchanges heads against tokens.
        why: the reason for these degrees, for the record.
    """

    mesh: SeqMesh
    local_route: str = "auto"
    exchange: HeadExchange = TORCH_EXCHANGE
    why: str = "given"


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
    pipe: WanPipeline,
    *,
    method: str | Method = "freespec",
    window_frames: int,
    kernel: str = "auto",
    ranks: Ranks | None = None,
    **settings: Any,
) -> MethodHandle:
    """Put a method for long videos on a pipeline: `handle = apply_method(pipe, method="freespec", window_frames=21)`.

    Args:
        pipe: a Wan2.1 text-to-video pipeline, on any device, before or after `fuse_qkv_projections`, layerwise casting,
            CPU offload or `compile_repeated_blocks`.
        method: a name (direct, sliding_window, freespec) or a method object.
        window_frames: latent frames that the local branch sees: the native length of the model, 21 for Wan2.1.
        kernel: dense attention kernel, see `freespec.kernels`; `auto` takes the one for the device and dtype.
        ranks: how this process shares the video's tokens with others; None is a process alone.
        **settings: settings of the method, for example `alpha=3.0` for freespec.

    Raises:
        UserError: for a pipeline that the method cannot serve, an unknown method, kernel or setting.
    """
    WanAdapter.check_pipeline(pipe)
    transformer = pipe.transformer
    modules = WanAdapter.attention_modules(transformer)
    _check_free(transformer, modules)
    if window_frames < 1:
        raise UserError(f"window_frames must be 1 or more, got {window_frames}")
    if settings and not isinstance(method, str):
        raise UserError("settings go with a method's name; a method object has its own")
    try:
        made = make_method(method, **settings) if isinstance(method, str) else method
        select_kernel(kernel, get_module_execution_device(transformer), transformer.dtype)
    except ValueError as error:
        raise UserError(str(error)) from error
    shared = ranks or Ranks(mesh=GROUP_OF_ONE.acquire())
    state = RunState(
        method=made,
        window_frames=window_frames,
        kernel_name=kernel,
        mesh=shared.mesh,
        exchange=shared.exchange,
        local_route=shared.local_route,
    )
    originals = [(attn, attn.processor) for attn in modules]
    for layer, attn in enumerate(modules):
        attn.set_processor(BranchProcessor(state, layer))
    step_hook = transformer.register_forward_pre_hook(StepHook(state, lambda: pipe.scheduler), with_kwargs=True)
    return MethodHandle(state, [step_hook, *shard_hooks(state, transformer)], originals, alone=ranks is None)


def _check_free(transformer: nn.Module, modules: list[nn.Module]) -> None:
    """Refuse what would be ignored or would make attention wrong without a word."""
    if getattr(transformer, "_parallel_config", None) is not None:
        raise UserError(
            "the transformer already has diffusers' context parallel, which cannot be combined with a method"
        )
    for attn in modules:
        if isinstance(attn.processor, BranchProcessor):
            raise UserError("the pipeline already has a method; call its handle's remove() first")
        backend = getattr(attn.processor, "_attention_backend", None)
        if backend is not None:
            raise UserError(
                f"attention backend {backend} is set on the transformer, and a method chooses its own kernel; "
                "call transformer.reset_attention_backend() and pass kernel=... instead"
            )
