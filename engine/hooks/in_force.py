"""Checks that a method on a pipeline is still active: around each call of the pipeline and before each forward."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.adapters import ModelAdapter
from engine.adapters.base import unwrap
from engine.errors import UserError
from parallel.mesh import SeqMesh

# Hooks that act the same on every rank: these caches decide by the step alone or by the tokens of all ranks, and placement and dtype
# hooks skip nothing. Other hooks may skip blocks by the tokens of one rank, which would deadlock. Listed by full name, so that
# subclasses and new hooks are refused.
_SAFE_HOOKS = {"engine.hooks.step_cache.SharedFirstBlock"} | {
    f"diffusers.hooks.{name}"
    for name in (
        "first_block_cache.FBCBlockHook",  # does what its head decided
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
}


class Uncopyable:
    """Base of objects that belong to one pipeline: a copy or pickle would share its state and process groups."""

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """Raise UserError for copy.copy, copy.deepcopy, pickle and torch.save."""
        raise UserError(
            "a pipeline or model with a method or a timeline on it cannot be copied or pickled; call the handle's remove() first "
            "(save_pretrained works with it)"
        )


@dataclass(kw_only=True, eq=False)
class Guard(Uncopyable):
    """Processors and hooks installed on a pipeline, and the check that they are still there.

    Attributes:
        pipe: the pipeline.
        adapter: of its model.
        transformers: its transformers by part, not the wrapper of torch.compile.
        processors: those of the attentions of each, first block first.
        removed: whether they were removed.
    """

    APPLY: ClassVar[str]  # the function that applies it
    ATTENTION: ClassVar[str]  # the kind of attention that it concerns

    pipe: DiffusionPipeline
    adapter: ModelAdapter
    transformers: Mapping[str, Any]
    processors: Mapping[str, Sequence[Any]]
    removed: bool = False

    @property
    def name(self) -> str:
        """Its name in messages."""
        raise NotImplementedError

    @property
    def again(self) -> str:
        """Advice if it is no longer active."""
        return f"call the handle's remove(), then {self.APPLY} again"

    def modules(self, transformer: Any) -> list[nn.Module]:
        """The attentions that have its processors, as the transformer has them now."""
        raise NotImplementedError

    def registered(self) -> Sequence[RemovableHandle]:
        """Its hooks."""
        raise NotImplementedError

    def leave(self) -> None:
        """Stop checking calls, and restore the pipeline's class, unless another library has derived its own from it."""
        self.removed = True
        unguard(self.pipe)

    def check(self) -> None:
        """Raise UserError, with the first reason found, unless it is active for the next forward."""
        if found := self.problem():
            raise UserError(f"{self.name} is not in force: {found}")

    def problem(self) -> str | None:
        """The reason why it is inactive, with advice; None if it is active."""
        if self.removed:
            return f"it was removed; call {self.APPLY} again"
        for name, transformer in self.transformers.items():
            # a deleted pipe.transformer would be looked up in the configuration
            current = unwrap(vars(self.pipe).get(name))
            if current is not transformer:
                kind = "None" if current is None else f"another {type(current).__name__}"
                return f"pipe.{name} is {kind}, not the one that it was applied to; {self.again}"
            if found := self._layers(name) or parallel_problem(transformer):
                return found
        return self._hooks()

    def _layers(self, name: str) -> str | None:
        processors = self.processors[name]
        try:
            modules = self.modules(self.transformers[name])
        except AttributeError as error:
            return f"the {name}'s blocks were replaced ({error}); {self.again}"
        if len(modules) != len(processors):
            return f"the {name} has {len(modules)} {self.ATTENTION}s and had {len(processors)}; {self.again}"
        for layer, (attn, processor) in enumerate(zip(modules, processors, strict=True)):
            if attn.processor is not processor:
                kind = type(attn.processor).__name__
                return (
                    f"layer {layer} has another {self.ATTENTION.removeprefix('self-')} processor ({kind}); {self.again}"
                )
            if found := self.layer_problem(layer, attn):
                return found
        return None

    def layer_problem(self, layer: int, attn: nn.Module) -> str | None:
        """Another problem of an attention that has its processor; None without one."""
        return None

    def _hooks(self) -> str | None:
        lost = [hook for hook in self.registered() if not is_registered(hook)]
        return f"{len(lost)} of its hooks were removed from the transformer; {self.again}" if lost else None

    def call(self) -> AbstractContextManager[None]:
        """Wrap one call of the pipeline: raise UserError unless this is active before and throughout it."""
        raise NotImplementedError

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raise UserError for arguments of a call, by name, that this does not support."""
        return


@dataclass(kw_only=True, eq=False)
class Installed(Guard):
    """What `apply_method` installed on a pipeline, and the check that all of it is still there.

    Attributes:
        method: name of the method, for messages.
        mesh: the ranks.
        token_hooks: of each transformer, on the modules where tokens are made (`engine.hooks.token_hooks.TokenHooks`).
        tried: the scheduler that last passed its check, and its configuration then.
        draws_noise: whether it draws noise while it steps.
        hooks: registered on the transformers.
        step_hook: their object, which counts the steps (`engine.hooks.step_hook.StepHook`).
    """

    APPLY = "apply_method"
    ATTENTION = "self-attention"

    method: str
    mesh: SeqMesh
    token_hooks: Sequence[Any]
    tried: tuple[Any, dict[str, Any]]
    draws_noise: bool
    hooks: list[RemovableHandle] = field(default_factory=list)
    step_hook: Any = None

    @property
    def name(self) -> str:
        """See the base class."""
        return self.method

    def modules(self, transformer: Any) -> list[nn.Module]:
        """See the base class."""
        return self.adapter.attention_modules(transformer)

    def registered(self) -> Sequence[RemovableHandle]:
        """See the base class."""
        return [*self.hooks, *(hook for hooks in self.token_hooks for hook in hooks.registered)]

    def watch(self, step_hook: Any) -> None:
        """Register the transformers' hooks, and check every call of the pipeline from now on."""
        self.step_hook = step_hook
        for transformer in self.transformers.values():
            self.hooks += [
                transformer.register_forward_pre_hook(step_hook, with_kwargs=True),
                transformer.register_forward_hook(step_hook.after),
            ]
        self.pipe.__class__ = guarded(type(self.pipe), self)

    def before_forward(self) -> None:
        """Run `check`, and move the token hooks to modules that replaced theirs, such as a LoRA."""
        self.check()
        for hooks in self.token_hooks:
            hooks.follow()

    def active(self, timestep: float) -> Any:
        """The transformer that denoises this timestep."""
        return self.transformers[self.adapter.expert_at(timestep, self.pipe.config)]

    def problem(self) -> str | None:
        """See the base class; also the attention backend, the ranks, and the pipeline's configuration and scheduler."""
        found = super().problem() or backend_problem()
        if found is None and not self.mesh.is_alive:
            found = f"the process group that it was applied with was destroyed; {self.again}"
        return found or self._pipeline()

    def layer_problem(self, layer: int, attn: nn.Module) -> str | None:
        """See the base class."""
        return layer_problem(layer, attn)

    def _pipeline(self) -> str | None:
        """Check its configuration again, and its scheduler if that was replaced."""
        now = tried(vars(self.pipe).get("scheduler"))
        try:
            self.adapter.check_pipeline(self.pipe)
            if (found := tuple(self.adapter.experts(self.pipe))) != tuple(self.transformers):
                return f"the pipeline denoises with {' and '.join(found)}, and did with {' and '.join(self.transformers)}; {self.again}"
            if now[0] is not self.tried[0] or now[1] != self.tried[1]:
                self.draws_noise = self.adapter.check_scheduler(now[0])
        except UserError as error:
            return str(error)
        self.tried = now
        return None

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """See the base class."""
        if not self.removed:
            self.adapter.check_call(arguments)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Wrap one call of the pipeline: raise UserError unless the method is active before and throughout it."""
        if self.removed:
            yield
            return
        self.check()
        if self.draws_noise and self.mesh.world.size > 1:
            raise UserError(
                f"the {type(self.pipe.scheduler).__name__} draws noise in each step, which the {self.mesh.world.size} ranks would "
                "draw differently in the pipeline's own loop; use LongVideoEngine, or a scheduler without noise"
            )
        for transformer in self.transformers.values():
            transformer._reset_stateful_cache()  # as pipelines do at the end of a call, but not of one that fails
        self.step_hook.begin_call()
        try:
            yield
        except torch._dynamo.exc.Unsupported as error:
            if not any(is_compiled(getattr(self.pipe, name)) for name in self.transformers):
                raise
            raise UserError(
                "a method cannot go into one graph with the whole transformer (fullgraph=True); compile it without fullgraph, or "
                "call transformer.compile_repeated_blocks()"
            ) from error
        finally:
            self.step_hook.end_call()
        if not self.removed:
            self.check()
            self.step_hook.check_call(interrupted=bool(getattr(self.pipe, "_interrupt", False)))


def tried(scheduler: Any) -> tuple[Any, dict[str, Any]]:
    """A scheduler and a copy of its configuration, to detect a replacement."""
    config = getattr(scheduler, "config", None)
    return scheduler, dict(config) if isinstance(config, Mapping) else {}


def guarded(kind: type, installed: Guard) -> type:
    """Derive a class of the same name for the one pipeline of `installed`, whose calls are checked.

    If another transformer was put into the pipeline, no hooked module may be called, with prompt embeddings given and latents
    asked for, but the call itself is checked.
    """

    signature = inspect.signature(kind.__call__)

    class Guarded(kind):
        guard = installed

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            """Make a pipeline of the original class, for `type(pipe)(...)` and `type(pipe).from_pipe(...)`."""
            return kind(*args, **kwargs)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with installed.call():
                installed.check_arguments(signature.bind_partial(self, *args, **kwargs).arguments)
                return super().__call__(*args, **kwargs)

        def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
            if not installed.removed:
                installed.check()
            return super().prepare_latents(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            if installed.removed:  # under a class that another library derived from this one
                return super().__reduce_ex__(protocol)
            return installed.__reduce_ex__(protocol)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Guarded, name, getattr(kind, name))
    for name in ("__call__", "prepare_latents"):
        functools.update_wrapper(vars(Guarded)[name], getattr(kind, name))  # for inspect.signature
    return Guarded


def unguard(pipe: DiffusionPipeline) -> None:
    """Restore the pipeline's class, once classes derived from it are gone too."""
    while getattr(vars(type(pipe)).get("guard"), "removed", False):
        pipe.__class__ = type(pipe).__base__


def guard_of(pipe: DiffusionPipeline) -> Installed | None:
    """The method on a pipeline; None without one."""
    guards = [vars(kind).get("guard") for kind in type(pipe).__mro__]
    return next((guard for guard in guards if isinstance(guard, Installed) and not guard.removed), None)


def is_compiled(transformer: nn.Module) -> bool:
    """Whether torch.compile wraps the whole transformer, or compiles it in place."""
    return unwrap(transformer) is not transformer or transformer._compiled_call_impl is not None


def parallel_problem(transformer: nn.Module) -> str | None:
    """The message for a transformer with diffusers' own context parallel; None without it."""
    if getattr(transformer, "_parallel_config", None) is None:
        return None
    return "the transformer has diffusers' context parallel, which cannot be combined with a method; load it without"


def backend_problem() -> str | None:
    """The message for a global attention backend of diffusers; None for its default, torch's own."""
    backend = AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0])
    if backend is AttentionBackendName.NATIVE:
        return None
    return (
        f"attention backend {backend.value} is chosen for all of diffusers (DIFFUSERS_ATTN_BACKEND, attention_backend() or a model's "
        "set_attention_backend), and a method chooses its own kernel; leave the context or the variable out, or call "
        'pipe.transformer.set_attention_backend("native"), and pass kernel=... to apply_method'
    )


def layer_problem(layer: int, attn: nn.Module) -> str | None:
    """The message for a self-attention that diffusers computes in another way; None otherwise."""
    backend = getattr(attn.processor, "_attention_backend", None)
    if backend is not None and AttentionBackendName(backend) is not AttentionBackendName.NATIVE:
        return (
            f"attention backend {AttentionBackendName(backend).value} is set on layer {layer}, and a method chooses its own kernel; "
            'call pipe.transformer.set_attention_backend("native") and pass kernel=... to apply_method'
        )
    return None


def refuse_caches_of_one_rank(transformer: nn.Module) -> None:
    """Raise UserError for a hook of diffusers that may be unsafe over ranks; checked in each forward, as one may be added later."""
    unknown = sorted(
        kind.__name__ for kind in hook_kinds(transformer) if f"{kind.__module__}.{kind.__qualname__}" not in _SAFE_HOOKS
    )
    if unknown:
        config = getattr(transformer, "_cache_config", None)
        name = ", ".join(unknown) if config is None else type(config).__name__.removesuffix("Config")
        raise UserError(
            f"{name}: not known to decide the same on every rank; by one rank's tokens it would skip blocks in which others wait "
            "for it. Call transformer.disable_cache(), or use one rank"
        )


def skips_layers(transformer: nn.Module) -> bool:
    """Whether diffusers skips some layers in every step, as the stock pipeline would too."""
    return any(kind.__module__ == "diffusers.hooks.layer_skip" for kind in hook_kinds(transformer))


def hook_kinds(transformer: nn.Module) -> set[type]:
    """Classes of the hooks of diffusers on any part of the transformer."""
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    return {type(hook) for registry in registries if registry is not None for hook in registry.hooks.values()}


def is_registered(hook: RemovableHandle) -> bool:
    """Whether the hook is still on its module."""
    hooks = hook.hooks_dict_ref()
    return hooks is not None and hook.id in hooks
