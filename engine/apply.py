"""`apply_method`: a method for long videos on a user's own pipeline, in one line, and taken off again."""

from typing import Any

from diffusers import WanPipeline
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.adapters.wan import WanAdapter
from engine.errors import UserError
from engine.hooks import BranchProcessor, RunState, StepHook
from freespec.kernels import select_kernel
from freespec.methods import Method, make_method


class MethodHandle:
    """A method that is on a pipeline; `remove()` takes it off and leaves the pipeline as it was, bit for bit."""

    def __init__(self, state: RunState, hook: RemovableHandle, originals: list[tuple[nn.Module, Any]]) -> None:
        self.state = state
        self._hook = hook
        self._originals = originals

    def remove(self) -> None:
        """Put the pipeline's own processors back; a second call does nothing."""
        self._hook.remove()
        for attn, processor in self._originals:
            attn.set_processor(processor)
        self._originals = []

    def __enter__(self) -> "MethodHandle":
        """Use as a context manager that removes the method at its end."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove the method."""
        self.remove()


def apply_method(
    pipe: WanPipeline, *, method: str | Method = "freespec", window_frames: int, kernel: str = "auto", **settings: Any
) -> MethodHandle:
    """Put a method for long videos on a pipeline: `handle = apply_method(pipe, method="freespec", window_frames=21)`.

    Args:
        pipe: a Wan2.1 text-to-video pipeline, on any device, before or after `fuse_qkv_projections`, layerwise casting,
            CPU offload or `compile_repeated_blocks`.
        method: a name (direct, sliding_window, freespec) or a method object.
        window_frames: latent frames that the local branch sees: the native length of the model, 21 for Wan2.1.
        kernel: dense attention kernel, see `freespec.kernels`; `auto` takes the one for the device and dtype.
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
        select_kernel(kernel, pipe._execution_device, transformer.dtype)
    except ValueError as error:
        raise UserError(str(error)) from error
    state = RunState(method=made, window_frames=window_frames, kernel_name=kernel)
    originals = [(attn, attn.processor) for attn in modules]
    for layer, attn in enumerate(modules):
        attn.set_processor(BranchProcessor(state, layer))
    hook = transformer.register_forward_pre_hook(StepHook(state, lambda: pipe.scheduler), with_kwargs=True)
    return MethodHandle(state, hook, originals)


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
