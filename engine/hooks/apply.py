"""`apply_method`: install a method for long videos on a user's pipeline, and remove it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device

from engine.adapters import ModelAdapter, adapter_of_pipeline
from engine.adapters.base import half_of_two, refuse_one_of_two
from engine.checks import check_riflex
from engine.errors import UserError, as_user_error
from engine.hooks.in_force import (
    Installed,
    Uncopyable,
    backend_problem,
    guard_of,
    layer_problem,
    parallel_problem,
    tried,
)
from engine.hooks.self_attention import BranchProcessor
from engine.hooks.state import MethodSetup, RunState
from engine.hooks.step_hook import StepHook
from engine.hooks.token_hooks import TokenHooks
from engine.kernel_choice import select_kernels
from engine.load.weights import read_config
from engine.ranks.group_of_one import GROUP_OF_ONE
from engine.ranks.layouts import Ranks, check_layout
from freespec.far_keys import check_far
from freespec.methods import Direct, Method, make_method
from freespec.methods.base import check_rest_kernel
from freespec.riflex import Riflex, lowered_frequency


class MethodHandle(Uncopyable):
    """A method on a pipeline; `remove()` restores the pipeline bit for bit."""

    def __init__(
        self,
        state: RunState,
        installed: Installed,
        *,
        originals: Sequence[tuple[Any, Any]],
        alone: bool,
    ) -> None:
        self.state = state
        self._installed = installed
        self._originals = originals
        self._alone = alone

    @property
    def in_force(self) -> bool:
        """Whether the next call of the pipeline uses the method; `check` gives the reason if not."""
        return self._installed.problem() is None

    def check(self) -> None:
        """Raise UserError, with the reason and advice, unless the method is active.

        Each call of the pipeline and each forward of its transformer make the same check.
        """
        self._installed.check()

    def remove(self) -> None:
        """Restore the pipeline's own processors; a second call does nothing.

        Modules that had the method are restored regardless of later changes. A replaced transformer or scheduler stays in the
        pipeline.
        """
        installed = self._installed
        if installed.removed:
            return
        for hook in (*installed.hooks, *installed.token_hooks):
            hook.remove()
        for attn, processor in self._originals:
            attn.set_processor(processor)
        installed.leave()
        if self._alone and installed.mesh.is_alive:
            GROUP_OF_ONE.release()

    def __enter__(self) -> "MethodHandle":
        """Use as a context manager that removes the method at its end."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove the method."""
        self.remove()


def apply_method(  # noqa: PLR0913 - keywords of a public function
    pipe: DiffusionPipeline,
    *,
    method: str | Method = "freespec",
    window_frames: int,
    kernel: str = "auto",
    dual: str = "auto",
    complement: str = "same",
    far: int | str = "all",
    ranks: Ranks | None = None,
    riflex: Riflex | None = None,
    **settings: Any,
) -> MethodHandle:
    """Apply a method for long videos to a pipeline: `handle = apply_method(pipe, method="freespec", window_frames=21)`.

    Args:
        pipe: a WanPipeline or WanImageToVideoPipeline (also with the two transformers of Wan2.2 A14B), an LTXPipeline or an
            LTXImageToVideoPipeline, on any device, before or after `fuse_qkv_projections`, layerwise casting, CPU offload or
            `compile_repeated_blocks`.
        method: a name (direct, sliding_window, freenoise, freelong, freepca, freespec, direct_far), a class as package.module:Class, or a
            method object.
        window_frames: latent frames that the local branch sees: the native length of the model, 21 for Wan2.1 and 16 for
            LTX-Video.
        kernel: dense attention kernel, see `freespec.kernels`; `auto` selects one for the device and dtype.
        dual: how dual steps compute both branches: `strided`, `triton`, or `auto`, see `freespec.kernels.select_dual`.
        complement: kernel for the keys outside the windows in dual steps: `same` or `sage`, see
            `freespec.kernels.select_complement`.
        far: how many of those keys: `all`, a share of each frame's such as `1/8`, or a number of keys such as 4096.
        ranks: how this process shares the video's tokens with others; None for a single process.
        riflex: lowers one temporal frequency of the rotary table; disabled by default.
        **settings: settings of the method, for example `alpha=3.0` for freespec.

    Raises:
        UserError: for a pipeline that the method cannot serve, an unknown method, kernel or setting. A call of the pipeline
            raises it for latents or predictions with NaN or infinity.
    """
    adapter = adapter_of_pipeline(pipe)
    adapter.check_pipeline(pipe)
    experts, transformer = adapter.experts(pipe), adapter.transformer_of(pipe)
    modules = {name: adapter.attention_modules(part) for name, part in experts.items()}
    for name, part in experts.items():
        _check_free(pipe, part, modules[name])
    _check_folders(adapter, pipe, experts)
    if window_frames < 1:
        raise UserError(f"window_frames must be 1 or more, got {window_frames}")
    riflex = riflex or Riflex()
    made = _make(
        adapter, transformer, method, window_frames, kernels=(kernel, dual, complement), riflex=riflex, **settings
    )
    name = method if isinstance(method, str) else type(made).__name__
    with as_user_error():
        check_far(far, made, name)
        check_rest_kernel(made, name, dual=dual, complement=complement)
    if ranks is not None:
        check_layout(name, made, ranks.degrees)
        if ranks.hybrid is not None and not isinstance(made, Direct):
            raise UserError(f"{type(ranks.hybrid).__name__} computes full attention only, which is the method direct")
    draws_noise = adapter.check_scheduler(pipe.scheduler)
    shared = ranks or Ranks(mesh=GROUP_OF_ONE.acquire())
    state = RunState(
        MethodSetup(
            adapter=adapter,
            method=made,
            window_frames=window_frames,
            kernel=kernel,
            dual=dual,
            complement=complement,
            far=far,
            mesh=shared.mesh,
            exchange=shared.exchange,
            hybrid=shared.hybrid,
            local_route=shared.local_route,
        )
    )
    installed = Installed(
        pipe=pipe,
        adapter=adapter,
        transformers=experts,
        method=name,
        mesh=shared.mesh,
        processors={
            part: tuple(BranchProcessor(state, layer) for layer in range(len(modules[part]))) for part in experts
        },
        token_hooks=[TokenHooks(state, part, riflex) for part in experts.values()],
        tried=tried(pipe.scheduler),
        draws_noise=draws_noise,
    )
    originals = [(attn, attn.processor) for part in modules.values() for attn in part]
    for part, attentions in modules.items():
        for attn, processor in zip(attentions, installed.processors[part], strict=True):
            attn.set_processor(processor)
    step_hook = StepHook(
        state,
        lambda: pipe.scheduler,
        before_forward=installed.before_forward,
        active=installed.active,
        processors={experts[part]: installed.processors[part] for part in experts},
    )
    installed.watch(step_hook)
    return MethodHandle(state, installed, originals=originals, alone=ranks is None)


def _make(
    adapter: ModelAdapter,
    transformer: Any,
    method: str | Method,
    window_frames: int,
    *,
    kernels: tuple[str, str, str],
    riflex: Riflex,
    **settings: Any,
) -> Method:
    """Make the method, after checking it, its kernels (dense, dual, complement) and RIFLEx."""
    if settings and not isinstance(method, str):
        raise UserError("settings go with a method's name; a method object has its own")
    check_riflex(adapter, riflex)
    kernel, dual, complement = kernels
    with as_user_error():
        made = make_method(method, **settings) if isinstance(method, str) else method
        made.check_window(window_frames)
        made.check_layers(len(adapter.attention_modules(transformer)))
        where = get_module_execution_device(transformer), transformer.dtype
        select_kernels(*where, kernel=kernel, dual=dual, complement=complement)
        if riflex.enabled:
            frequencies = [frequency for frequency, _ in adapter.temporal_frequencies(transformer)]
            lowered_frequency(riflex, frequencies, num_frames=1, window_frames=window_frames)  # raises if there is none
    return made


def _check_free(pipe: DiffusionPipeline, transformer: Any, modules: Sequence[Any]) -> None:
    """Refuse a pipeline that would ignore the method or compute wrong attention silently."""
    hooked = any(isinstance(hook, StepHook) for hook in transformer._forward_pre_hooks.values())
    if guard_of(pipe) or hooked or any(isinstance(attn.processor, BranchProcessor) for attn in modules):
        raise UserError("the pipeline already has a method; call its handle's remove() first")
    problem = parallel_problem(transformer) or backend_problem()
    for layer, attn in enumerate(modules):
        problem = problem or layer_problem(layer, attn)
    if problem:
        raise UserError(problem)


def _check_folders(adapter: ModelAdapter, pipe: DiffusionPipeline, experts: Mapping[str, Any]) -> None:
    """Check the folders, or hub names, that pipeline and transformer were loaded from for a second transformer."""
    if len(experts) > 1:
        return
    for name in filter(None, (part.config.get("_name_or_path") for part in (*experts.values(), pipe))):
        refuse_one_of_two(name)
        for folder in (Path(name), Path(name).parent):  # of a whole checkpoint, or of one of its parts
            if not (folder / "model_index.json").is_file():
                continue
            index = read_config(folder / "model_index.json")
            adapter.check_folder(folder, index)
            if len(adapter.experts_named(index)) > 1:
                raise half_of_two(f"boundary_ratio {index['boundary_ratio']} in {folder / 'model_index.json'}")
