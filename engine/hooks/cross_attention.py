"""`apply_timeline`: a prompt that changes over time, by a processor on every cross-attention of a pipeline."""

import bisect
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engine.adapters import ModelAdapter, adapter_of_pipeline
from engine.adapters.base import join_texts
from engine.errors import UserError
from engine.hooks.in_force import Uncopyable
from engine.hooks.self_attention import BranchProcessor
from engine.hooks.step_hook import bind_forward
from engine.hooks.timeline_in_force import TimelineGuard
from engine.text.timeline import negative_texts, parse_timeline, read_timeline
from freespec.events import Event, Piece, plan, repeated
from freespec.kernels import Kernel, select_kernel
from freespec.timeline import Partial, attend, place


@dataclass(kw_only=True)
class TimelineState(Uncopyable):
    """State shared by the cross-attentions of a pipeline's transformers; the hook writes it before each forward.

    Attributes:
        adapter: of the pipeline.
        events: returns the events of a video by its number of token frames.
        num_texts: number of concatenated texts, [B, num_texts K, C].
        text_tokens: K.
        pieces: the texts that each frame attends to.
        frame_tokens: tokens per frame.
        lengths: tokens without padding of each text, by batch item; None if padding is attended, or no relay needs them.
        kernel: attention that returns the log-sum-exp.
    """

    adapter: ModelAdapter
    events: Callable[[int], tuple[Event, ...]]
    num_texts: int
    text_tokens: int
    pieces: tuple[Piece, ...] = ()
    frame_tokens: int = 0
    lengths: list[list[int]] | None = None
    kernel: Kernel | None = None
    _plans: dict[tuple[int, tuple[int, ...], torch.device, torch.dtype], tuple[Piece, ...]] = field(
        default_factory=dict
    )

    def before_forward(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the transformer: plan the pieces of this video, and check that the texts are the timeline's."""
        inputs = bind_forward(transformer, args, kwargs)
        text, latents = inputs["encoder_hidden_states"], inputs["hidden_states"]
        if text.shape[1] != self.num_texts * self.text_tokens:
            raise UserError(
                f"the pipeline has a timeline of {self.num_texts} texts and was called with {text.shape[1]} text tokens; call "
                "it with **handle.inputs in place of prompt and negative_prompt"
            )
        frames, rows, columns = self.adapter.grid(transformer, inputs)
        beside = self._beside(transformer)
        frames -= len(beside)
        shown = sorted([*range(frames), *beside])  # the latent frame of each frame of tokens
        key = (frames, beside, latents.device, latents.dtype)
        if key not in self._plans:
            pieces = repeated(plan(self.events(frames), frames), shown)
            self._plans[key] = place(pieces, latents.device, latents.dtype)
        self.pieces, self.frame_tokens = self._plans[key], rows * columns
        self.kernel = select_kernel("auto", latents.device, latents.dtype)
        scenes = [event.start for event in self.events(frames)[1:] if event.transition == "scene"]
        self._set_scenes(transformer, tuple(bisect.bisect_left(shown, start) for start in scenes))
        relays = any(len(share.events) > 1 for piece in self.pieces for share in piece.shares)
        mask = inputs.get("encoder_attention_mask")
        self.lengths = _lengths(mask, self.num_texts) if relays and mask is not None else None

    def _beside(self, transformer: nn.Module) -> tuple[int, ...]:
        """`RunState.beside` of an installed method."""
        processor = self.adapter.attention_modules(transformer)[0].processor
        return processor.state.beside if isinstance(processor, BranchProcessor) else ()

    def _set_scenes(self, transformer: nn.Module, starts: tuple[int, ...]) -> None:
        """Set where the windows of an installed method end; its own hook, which runs later, makes them."""
        for attn in self.adapter.attention_modules(transformer):
            if isinstance(attn.processor, BranchProcessor):
                attn.processor.state.scenes = starts

    def leave(self, transformers: Sequence[nn.Module]) -> None:
        """Clear the ends of windows at scenes."""
        for transformer in transformers:
            self._set_scenes(transformer, ())


class TimelineProcessor(Uncopyable):
    """Attention processor of one cross-attention: each frame attends to the texts of its events."""

    def __init__(self, state: TimelineState, stock: Any, self_attention: nn.Module) -> None:
        self.state = state
        self.stock = stock
        self._self_attention = self_attention

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """Hidden states [B, s, C] and the texts of all events [B, num_texts K, C], after the tokens of pictures -> [B, s, C]."""
        if encoder_hidden_states is None or rotary_emb is not None:
            raise ValueError("this processor serves cross-attention without a rotary table only")
        state, size = self.state, self.state.text_tokens
        images = encoder_hidden_states.shape[1] - state.num_texts * size
        q, k, v = state.adapter.cross_qkv(attn, hidden_states, encoder_hidden_states[:, images:])
        backend = getattr(self.stock, "_attention_backend", None)

        def one(index: int, rows: Tensor) -> Tensor:
            span = slice(index * size, (index + 1) * size)
            mask = None if attention_mask is None else attention_mask[:, None, :, span]
            return dispatch_attention_fn(rows, k[:, span], v[:, span], attn_mask=mask, backend=backend)

        def several(index: int, rows: Tensor) -> Partial:
            assert state.kernel is not None, "the hook sets it before each forward"
            lengths = [size] * len(rows) if state.lengths is None else [row[index] for row in state.lengths]
            return _with_lse(state.kernel, rows, (k, v), [(index * size, index * size + length) for length in lengths])

        processor = self._self_attention.processor
        start = processor.state.last.layout.shard[0] if isinstance(processor, BranchProcessor) else 0
        out = attend(q, state.pieces, q_start=start, frame_tokens=state.frame_tokens, one=one, several=several)
        out = out.to(q.dtype)
        if images:  # the same for every frame
            added = state.adapter.added_kv(attn, encoder_hidden_states[:, :images])
            out = out + dispatch_attention_fn(q, *added, backend=backend).to(q.dtype)
        return state.adapter.project_out(attn, out)


class TimelineHandle(Uncopyable):
    """A timeline on a pipeline; `remove()` restores the pipeline bit for bit.

    Attributes:
        inputs: arguments of the pipeline's call in place of prompt and negative_prompt; empty if the caller has the texts.
    """

    def __init__(
        self,
        hooks: Sequence[RemovableHandle],
        originals: list[tuple[Any, Any]],
        inputs: dict[str, Tensor],
        leave: Callable[[], None],
    ) -> None:
        self.inputs = inputs
        self._hooks = hooks
        self._leave = leave
        self._originals = originals
        self._guard: TimelineGuard | None = None

    def watch(self, pipe: DiffusionPipeline, adapter: ModelAdapter) -> None:
        """Check every call of the pipeline from now on."""
        experts = adapter.experts(pipe)
        self._guard = TimelineGuard(
            pipe=pipe,
            adapter=adapter,
            transformers=experts,
            processors={
                name: tuple(attn.processor for attn in adapter.cross_attention_modules(part))
                for name, part in experts.items()
            },
            hooks=self._hooks,
        )

    @property
    def in_force(self) -> bool:
        """Whether the next call of the pipeline uses the timeline; `check` gives the reason if not."""
        return self._guard is not None and self._guard.problem() is None

    def check(self) -> None:
        """Raise UserError, with the reason and advice, unless the timeline is active; each call checks this too."""
        if self._guard is not None:
            self._guard.check()

    def remove(self) -> None:
        """Restore the pipeline's own processors; a second call does nothing."""
        if self._guard is not None and not self._guard.removed:
            self._guard.leave()
        for hook in self._hooks:
            hook.remove()
        if self._originals:
            self._leave()
        for attn, processor in self._originals:
            attn.set_processor(processor)
        self._originals = []

    def __enter__(self) -> "TimelineHandle":
        """Use as a context manager that removes the timeline at its end."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove the timeline."""
        self.remove()


def apply_timeline(
    pipe: DiffusionPipeline,
    timeline: str,
    *,
    fps: int,
    negative_prompt: str = "",
    max_sequence_length: int | None = None,
) -> TimelineHandle:
    """Apply a timeline to a pipeline, with a method or without: `handle = apply_timeline(pipe, "a [0-4s] | b [4s-]", fps=16)`.

    Call the pipeline with `pipe(**handle.inputs, num_frames=...)`; `handle.remove()` restores it.

    Args:
        pipe: a WanPipeline or an LTXPipeline, before or after `apply_method`.
        timeline: events as text, or a YAML file, see docs/timeline.md.
        fps: frames per second that seconds are counted in; for LTX-Video the `frame_rate` of the call.
        negative_prompt: one for all events, or a timeline of the same number of events.
        max_sequence_length: text tokens of each event; None is the default of the pipeline's call.

    Raises:
        UserError: for an invalid timeline. One that does not fit the video is refused when the pipeline is called.
    """
    adapter = adapter_of_pipeline(pipe)
    adapter.check_pipeline(pipe)
    prompt, negative = read_timeline(timeline)
    parsed = parse_timeline(prompt)
    assert parsed is not None
    parsed, negatives = parsed.joined(negative_texts(parsed, negative or negative_prompt))
    if max_sequence_length is None:
        max_sequence_length = inspect.signature(pipe.__call__).parameters["max_sequence_length"].default
    device = get_module_execution_device(pipe.transformer)
    texts = [*parsed.texts, *negatives]
    with torch.no_grad():  # as in the pipeline's call: with gradients torch takes other kernels
        encoded = dict(zip(texts, adapter.encode_text(pipe, texts, max_sequence_length, device), strict=True))
    inputs: dict[str, Tensor] = {}
    for prefix, names in (("", parsed.texts), ("negative_", negatives)):
        joined = join_texts([encoded[name] for name in names])
        inputs |= {f"{prefix}{name}": tensor for name, tensor in zip(adapter.text_arguments, joined, strict=True)}
    step = (
        pipe.vae_scale_factor_temporal
        if hasattr(pipe, "vae_scale_factor_temporal")
        else pipe.vae_temporal_compression_ratio
    )

    def events(frames: int) -> tuple[Event, ...]:
        return parsed.in_latents(num_frames=(frames - 1) * step + 1, fps=fps, step=step)

    text_tokens = encoded[texts[0]][0].shape[1]
    handle = install_timeline(
        list(adapter.experts(pipe).values()),
        adapter,
        events,
        num_texts=len(parsed.texts),
        text_tokens=text_tokens,
        inputs=inputs,
    )
    handle.watch(pipe, adapter)
    return handle


def install_timeline(
    transformers: Sequence[nn.Module],
    adapter: ModelAdapter,
    events: Callable[[int], tuple[Event, ...]],
    *,
    num_texts: int,
    text_tokens: int,
    inputs: dict[str, Tensor] | None = None,
) -> TimelineHandle:
    """Install the processors and the hook of a timeline on a pipeline's transformers; texts are concatenated, see `join_texts`.

    A forward with any other number of text tokens than `num_texts` times `text_tokens` raises UserError.
    """
    for part in transformers:
        adapter.check_texts(part)
    modules = [attn for part in transformers for attn in adapter.cross_attention_modules(part)]
    if any(isinstance(attn.processor, TimelineProcessor) for attn in modules):
        raise UserError("the pipeline already has a timeline; call its handle's remove() first")
    state = TimelineState(adapter=adapter, events=events, num_texts=num_texts, text_tokens=text_tokens)
    originals = [(attn, attn.processor) for attn in modules]
    beside = [attn for part in transformers for attn in adapter.attention_modules(part)]
    for attn, own in zip(modules, beside, strict=True):
        attn.set_processor(TimelineProcessor(state, attn.processor, own))
    # Before the method's hook, in any order of installation, since it sets where windows end.
    hooks = [
        part.register_forward_pre_hook(state.before_forward, with_kwargs=True, prepend=True) for part in transformers
    ]
    return TimelineHandle(hooks, originals, inputs or {}, functools.partial(state.leave, transformers))


def _lengths(mask: Tensor, num_texts: int) -> list[list[int]]:
    """Lengths of each text by batch item, from a mask [B, num_texts K] of 1 for tokens, which come first, and 0 for padding."""
    per_text = mask.unflatten(1, (num_texts, -1)) > 0.5
    if bool((per_text[..., 1:] & ~per_text[..., :-1]).any()):
        raise UserError("a text has padding before its words, which a relay cannot skip; use cut or fade")
    return per_text.sum(-1).tolist()


def _with_lse(kernel: Kernel, q: Tensor, kv: tuple[Tensor, Tensor], spans: Sequence[tuple[int, int]]) -> Partial:
    """Attention of q [B, s, N, D] to the tokens [start, stop) of k and v that each batch item has, with its lse [B, s, N]."""
    batches = [slice(None)] if len(set(spans)) == 1 else [slice(i, i + 1) for i in range(len(spans))]
    parts = []
    for rows in batches:
        start, stop = spans[rows.start or 0]
        out, lse = kernel(*(x.transpose(1, 2) for x in (q[rows], kv[0][rows, start:stop], kv[1][rows, start:stop])))
        parts.append((out.transpose(1, 2), lse.transpose(1, 2)))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(x) for x in zip(*parts, strict=True))  # type: ignore[return-value]
