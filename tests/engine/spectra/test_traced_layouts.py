"""The real Wan transformers at 321 frames in every layout of 8 ranks, on fake tensors: shapes, and that a ring holds no whole.

Two layers of the published widths: all layers are alike, and 30 or 40 of them would show the same thing for minutes. How
much a forward holds at once is in test_planner.py, what a layer sends in tests/parallel/test_wan_shapes.py.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from engine.adapters.wan_published import PUBLISHED
from engine.config import MethodConfig, ModelConfig, ParallelConfig, RunConfig, SamplerConfig, VideoConfig
from engine.errors import UserError
from engine.hooks import step_hook
from engine.hooks.apply import apply_method
from engine.hooks.self_attention import BranchProcessor
from engine.hooks.step_hook import StepHook
from engine.planner.arrange import choose_degrees
from engine.planner.model import ModelSpec
from engine.ranks.layouts import Ranks
from freespec import attention
from freespec.windows import window_range
from parallel import collectives
from parallel.attention import SequenceLayout
from parallel.shards import Mode, halo_needs, length
from tests.engine.golden import Degrees, all_degrees
from tests.parallel.worlds import small_mesh

SMALL, LARGE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
METHODS: dict[str, Mode] = {"freespec": "dual", "direct": "global", "sliding_window": "local"}  # and their first step
FRAMES, ROWS, COLUMNS, WINDOW, LAYERS = 81, 60, 104, 21, 1  # latents of 321 frames of 480 x 832
FRAME_TOKENS = ROWS * COLUMNS // 4
TOKENS = FRAMES * FRAME_TOKENS
RANK, WORLD = 3, 8  # a rank with neighbours on both sides of most rings
BF16_BYTES = 2


@dataclass
class Seen:
    """What the attention of a forward made: tokens of its tensors, and bytes of the largest."""

    layers: int = 0
    most_tokens: int = 0
    largest: int = 0
    layouts: list[SequenceLayout] = field(default_factory=list)


class Watch(TorchDispatchMode):
    """Notes every tensor that is made: its longest dimension is its tokens, unless it is a flat message."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.seen.largest = max(self.seen.largest, x.untyped_storage().nbytes())
                if x.dim() > 2:
                    self.seen.most_tokens = max(self.seen.most_tokens, *x.shape)
        return out


@pytest.fixture
def fake_world() -> Iterator[None]:
    """Rank 3 of 8 on torch's fake backend, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    yield
    dist.destroy_process_group()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Filled in by every self-attention of a forward, between its hidden state and its output."""
    attend, find_step, noted = BranchProcessor.__call__, StepHook._find_step, Seen()

    def watched(processor: BranchProcessor, attn: nn.Module, hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        state = processor.state
        assert hidden.shape[1] == length(state.last.layout.shard)
        noted.layers += 1
        noted.layouts.append(state.last.attention_layout)
        with Watch(noted):
            out = attend(processor, attn, hidden, *others, **named)
        assert out.shape == hidden.shape
        return out

    def with_numbers(hook: StepHook, timestep: float) -> int:
        with unset_fake_temporarily():  # the scheduler's timesteps are real, and are read
            return find_step(hook, timestep)

    monkeypatch.setattr(BranchProcessor, "__call__", watched)
    # Merges go an eighth of the tokens at a time, which would be traced eight times; test_planner.py counts their memory.
    monkeypatch.setattr(attention, "merge_step", lambda num_tokens: num_tokens)
    monkeypatch.setattr(StepHook, "_find_step", with_numbers)
    monkeypatch.setattr(step_hook, "gathers_keys", lambda _device: False)  # as on a GPU
    return noted


def forward(name: str, degrees: Degrees, method: str) -> Mode:
    """The first step of the published transformer under the engine's hooks; returns its mode."""
    configs = PUBLISHED[name]
    spec = ModelSpec(name=name, source="test", configs=configs)
    scheduler = getattr(diffusers, configs["scheduler"]["_class_name"]).from_config(configs["scheduler"])
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    first = float(scheduler.timesteps[0])
    cfg, ring, ulysses = degrees
    ranks = Ranks(mesh=small_mesh(cfg=cfg, ring=ring, ulysses=ulysses))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        transformer = spec.adapter.build("transformer", configs["transformer"] | {"num_layers": LAYERS}).eval()
        assert type(transformer) is diffusers.WanTransformer3DModel
        kept = transformer._keep_in_fp32_modules
        for path, parameter in transformer.named_parameters():
            if not any(part in path.split(".") for part in kept):
                parameter.data = parameter.data.bfloat16()
        pipe = spec.adapter.pipeline_class(
            text_encoder=None, tokenizer=None, vae=spec.vae, scheduler=scheduler, transformer=transformer
        )
        latents = torch.empty(1, 16, FRAMES, ROWS, COLUMNS, dtype=torch.bfloat16)
        text = torch.empty(1, 512, 4096, dtype=torch.bfloat16)
        with apply_method(pipe, method=method, window_frames=WINDOW, kernel="cpu_flash", ranks=ranks) as handle:
            handle.state.checks_finite = False  # there are no numbers
            out = transformer(latents, torch.tensor([first]), text, return_dict=False)[0]
        assert out.shape == latents.shape
        assert out.dtype == latents.dtype
    return handle.state.last.mode


def held_tokens(layout: SequenceLayout, mode: Mode) -> int:
    """The tokens of the longest thing that this rank may hold: its own, or with a local branch its halo, which has them."""
    shards, mine = layout.plan.ring_shards, layout.mesh.ring.rank
    if mode == "global":
        return max(map(length, shards))  # the ring's buffers are as long as the longest

    def halo(start: int, stop: int) -> tuple[int, int]:
        return window_range(start, stop, num_frames=FRAMES, frame_tokens=FRAME_TOKENS, window_frames=WINDOW)

    return max(length(halo_needs(shards, halo, TOKENS)[mine]), *map(length, shards))


@pytest.mark.usefixtures("fake_world")
@pytest.mark.parametrize("degrees", all_degrees(WORLD))
@pytest.mark.parametrize(("name", "method"), [*((SMALL, method) for method in METHODS), (LARGE, "freespec")])
def test_a_forward_has_its_shape_and_no_whole_sequence_on_a_ring(
    name: str, degrees: Degrees, method: str, seen: Seen
) -> None:
    mode = forward(name, degrees, method)
    assert mode == METHODS[method]
    assert seen.layers == LAYERS
    layout = seen.layouts[0]
    assert (layout.mesh.cfg.size, layout.mesh.sequence.size) == (degrees[0], WORLD // degrees[0])
    held = held_tokens(layout, mode)
    # The rest of a dual step are keys outside of a window, written again as far as the windows slide.
    rest = 2 * (held - WINDOW * FRAME_TOKENS) if mode == "dual" else 0
    assert held <= seen.most_tokens <= max(held, rest)
    # of the heads that this rank has there: keys and values of all tokens in one tensor
    heads = length(layout.plan.head_shares[layout.mesh.ulysses.rank])
    whole_kv = 2 * TOKENS * heads * 128 * BF16_BYTES
    on_ring = layout.plan.ring > 1  # or local steps by halo
    assert (held < TOKENS) == (seen.most_tokens < TOKENS) == (seen.largest < whole_kv) == on_ring


@pytest.mark.usefixtures("fake_world")
def test_negative_control_a_layout_that_gathers_the_sequence_is_noticed(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What many do instead of a ring: all keys and values on every rank, and one call of attention."""

    def gathered(layout: SequenceLayout, q: Tensor, *rest: Any) -> tuple[None, Tensor]:
        *keys, _mode, kernels = rest
        sizes = [length(shard) for shard in layout.plan.ring_shards]
        k, v = (
            collectives.gather_tokens(x, token_sizes=sizes, group=layout.mesh.ring.group, trace=layout.trace)
            for x in keys
        )
        return None, kernels.dense(q, k, v)[0]

    monkeypatch.setattr(SequenceLayout, "branches", gathered)
    mode = forward(SMALL, (1, 8, 1), "direct")
    assert seen.most_tokens == TOKENS > held_tokens(seen.layouts[0], mode)


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_every_other_arrangement_of_eight_ranks_is_refused_with_its_reason(name: str) -> None:
    spec = ModelSpec(name=name, source="test", configs=PUBLISHED[name])
    feasible = all_degrees(WORLD)
    for degrees in itertools.product(range(1, WORLD + 1), repeat=3):
        if degrees in feasible:
            assert choose(spec, degrees, "freespec") == degrees
        elif degrees[0] > 2:
            with pytest.raises(
                UserError, match=rf"parallel.cfg must be 1 or 2 \(there are two passes\), got {degrees[0]}"
            ):
                choose(spec, degrees, "freespec")
        else:
            assert prod(degrees) != WORLD  # so heads and tokens allow all others
            with pytest.raises(UserError, match=r"8 ranks cannot be arranged with cfg .*; possible are 1 x 8 x 1, "):
                choose(spec, degrees, "freespec")
    with pytest.raises(UserError, match="freepca cannot run as cfg 1 x ring 8 x ulysses 1: ring must be 1"):
        choose(spec, (1, 8, 1), "freepca")
    with pytest.raises(UserError, match=r"parallel.cfg is 2, but sampler.guidance_scale 1.0 runs one pass only"):
        choose(spec, (2, 1, 4), "freespec", guidance=1.0)


def choose(spec: ModelSpec, degrees: Degrees, method: str, *, guidance: float = 6.0) -> Degrees:
    """What 8 ranks on a CPU do with a configuration that asks for these degrees."""
    cfg, ring, ulysses = degrees
    config = RunConfig(
        model=ModelConfig(path=spec.name),
        video=VideoConfig(num_frames=321, height=480, width=832),
        sampler=SamplerConfig(guidance_scale=guidance),
        method=MethodConfig(name=method, window_frames=WINDOW),
        parallel=ParallelConfig(cfg=cfg, ring=ring, ulysses=ulysses),
    )
    return choose_degrees(config, spec, WORLD, None)[0]
