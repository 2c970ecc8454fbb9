"""One forward of the transformer on the meta device: what it computes, moves and holds outside of self-attention."""

import functools
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from engine.adapters import ModelAdapter
from engine.adapters.base import Condition, VideoSpec
from engine.decode.live_bytes import LiveBytes
from engine.errors import UserError, first_line
from engine.given.frames import Places
from engine.planner.layout import Layout
from engine.planner.model import FP32_BYTES, in_fp32

META = torch.device("meta")
_PASSES = ("cond", "uncond")
# Operators that read or write no memory of their own: products count as operations, and views are free.
_NOT_TRAFFIC = ("mm", "bmm", "addmm", "baddbmm", "convolution", "empty", "detach")


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """Counts of one forward on one rank, for its whole batch, self-attention and cross-attention kernels aside.

    Attributes:
        block_operations: floating-point operations of one block.
        other_operations: those before the first block and after the last.
        block_traffic: bytes that the elementwise operators of a block read and write.
        peak: most bytes alive at once, with attention that returns its queries.
        at_attention: bytes alive when self-attention starts, its input included.
        text: bytes of the text of one pass.
        condition: bytes of the condition of given pictures.
    """

    block_operations: int
    other_operations: int
    block_traffic: int
    peak: int
    at_attention: int
    text: int
    condition: int


def count_forward(layout: Layout) -> Forward:
    """Count the forward of the busiest rank of a layout; UserError for a configuration whose model does not run."""
    spec = layout.spec
    config = json.dumps(spec.configs["transformer"], sort_keys=True)
    grid = (layout.video_frames, layout.rows, layout.columns)
    size = tuple(num * step for num, step in zip(grid, spec.video.patch, strict=True))
    try:
        return _count(
            spec.adapter,
            config,
            json.dumps(spec.configs["model_index"], sort_keys=True),
            spec.video,
            size=size,
            shard=layout.share("global").shard,
            batch=layout.batch,
            text_tokens=layout.text,
            image_tokens=spec.image_tokens,
            itemsize=layout.itemsize,
            given=layout.given,
        )
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the transformer's configuration of {spec.name} describes no {spec.adapter.name} that runs ({first_line(error)})"
        ) from error


@functools.lru_cache(maxsize=4096)
def _count(  # noqa: PLR0913 - all that decides it, as its cache's key
    adapter: ModelAdapter,
    config: str,
    index: str,
    video: VideoSpec,
    *,
    size: tuple[int, int, int],
    shard: int,
    batch: int,
    text_tokens: int,
    image_tokens: int,
    itemsize: int,
    given: Places,
) -> Forward:
    dtype = torch.float32 if itemsize == FP32_BYTES else torch.bfloat16
    model = _one_block(adapter, config, dtype, image_tokens)
    _take_tokens(adapter, model, shard)
    text = adapter.empty_text(model, text_tokens, META)
    latents = torch.empty(1, video.channels, *size, device=META)
    pipe = SimpleNamespace(
        transformer=model,
        config=json.loads(index),
        vae_temporal_compression_ratio=video.temporal_factor,
        vae_spatial_compression_ratio=video.spatial_factor,
    )
    condition = adapter.empty_condition(model, latents.shape, image_tokens) or _empty_condition(latents, given)
    flops = FlopCounterMode(display=False)
    counter = _Counter(flops)
    [block], [attention] = adapter.blocks(model), adapter.attention_modules(model)
    counter.watch(block, attention)
    with torch.no_grad(), counter, flops:
        texts, timestep = dict.fromkeys(_PASSES[:batch], text), torch.empty((), device=META)
        adapter.predict(pipe, latents, timestep, texts, fps=1, condition=condition)
    return Forward(
        block_operations=counter.block_operations,
        other_operations=flops.get_total_flops() - counter.block_operations,
        block_traffic=counter.traffic,
        peak=counter.peak,
        at_attention=counter.at_attention,
        text=sum(part.nbytes for part in text),
        condition=0 if condition is None else condition.nbytes,
    )


def _empty_condition(latents: Tensor, given: Places) -> Condition | None:
    """The condition of given frames that the model can do without; of latent frames without noise the first."""
    if not given.first and not given.moments:
        return None
    beside = latents.new_empty(*latents.shape[:2], len(given.moments), *latents.shape[3:])
    return Condition(
        latents=latents[:, :, :1].clone() if given.first else None,
        beside=beside if given.moments else None,
        moments=given.moments,
    )


def _one_block(adapter: ModelAdapter, config: str, dtype: torch.dtype, image_tokens: int) -> Any:
    """The transformer with one block in the precisions that it is loaded in, with attentions that project and return their queries."""
    with META:
        model = adapter.build("transformer", json.loads(config) | {"num_layers": 1}).eval()
    for name, parameter in model.named_parameters():
        if not in_fp32(model, name):
            parameter.data = parameter.data.to(dtype)

    def attend(attn: nn.Module, hidden: Tensor, text: Any = None, mask: Any = None, rotary: Any = None) -> Tensor:
        if text is None:
            q, *_ = adapter.qkv(attn, hidden, rotary)
        else:
            q, *_ = adapter.cross_qkv(attn, hidden, text[:, image_tokens:])
            if image_tokens:
                adapter.added_kv(attn, text[:, :image_tokens])
        return adapter.project_out(attn, q)

    for attn in (*adapter.attention_modules(model), *adapter.cross_attention_modules(model)):
        attn.set_processor(attend)
    return model


def _take_tokens(adapter: ModelAdapter, model: nn.Module, shard: int) -> None:
    """Give the block the first `shard` tokens, and the caller as many as there are, as `TokenHooks` does on each rank."""
    embedding, rotary, output = adapter.shard_points(model)
    tokens = 0

    def cut(_module: nn.Module, _args: tuple, embedded: Tensor) -> Tensor:
        nonlocal tokens
        own = adapter.shard_embedding(embedded, 0, shard)
        tokens = embedded.numel() * shard // own.numel()
        return own

    embedding.register_forward_hook(cut)
    if (condition := adapter.shard_condition(model)) is not None:
        condition.register_forward_pre_hook(
            lambda _module, args, kwargs: adapter.shard_timesteps(args, kwargs, 0, shard), with_kwargs=True
        )
    rotary.register_forward_hook(lambda _module, _args, tables: adapter.shard_rotary(tables, 0, shard))
    output.register_forward_hook(lambda _module, _args, out: out.new_empty(len(out), tokens, out.shape[2]))


class _Counter(LiveBytes):
    """Live bytes of a forward, and the traffic and operations of its block, through hooks on the modules."""

    def __init__(self, flops: FlopCounterMode) -> None:
        super().__init__()
        self.traffic = 0
        self.block_operations = 0
        self.at_attention = 0
        self._flops = flops
        self._counting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operator and count what it reads and writes inside the block."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self._counting and not func.is_view and func._schema.name.partition("::")[2] not in _NOT_TRAFFIC:
            self.traffic += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out

    def watch(self, block: nn.Module, attention: nn.Module) -> None:
        """Count inside this block; RMS norms as the one kernel that they are on a GPU."""
        block.register_forward_pre_hook(self._enter_block)
        block.register_forward_hook(self._leave_block)
        attention.register_forward_pre_hook(self._enter_attention)
        for norm in (module for module in block.modules() if isinstance(module, nn.RMSNorm)):
            norm.register_forward_pre_hook(self._enter_norm)
            norm.register_forward_hook(self._leave_norm)

    def _enter_block(self, *_: Any) -> None:
        self._counting = True
        self.block_operations -= self._flops.get_total_flops()

    def _leave_block(self, *_: Any) -> None:
        self._counting = False
        self.block_operations += self._flops.get_total_flops()

    def _enter_attention(self, *_: Any) -> None:
        self.at_attention = self.now

    def _enter_norm(self, *_: Any) -> None:
        self._counting = False

    def _leave_norm(self, _module: nn.Module, inputs: tuple, out: Tensor) -> None:
        self._counting = True
        self.traffic += inputs[0].nbytes + out.nbytes
