"""Wan2.1-1.3B at 321 frames with random weights, and one denoising step of it by any method."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from benchmarks.sections.bench import Bench
from engine import apply_method
from engine.adapters.wan_published import PUBLISHED
from engine.ranks.layouts import Ranks
from freespec.methods import Method

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
NUM_STEPS = 50
FLOW_SHIFT = 8.0  # as configs/wan2.1-t2v-1.3b.yaml
GUIDANCE = 6.0
TEXT_TOKENS = 512
LATENTS = (1, 16, 81, 60, 104)  # 321 frames of 832 x 480
WINDOW = 21
SMALL_TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 128,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
SMALL_VAE = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A pipeline without VAE and text encoder, and what its transformer is given."""

    pipe: WanPipeline
    latents: Tensor
    texts: tuple[Tensor, Tensor]
    window_frames: int

    def timesteps(self) -> list[float]:
        """Timesteps of a whole run, noisiest first."""
        self.pipe.scheduler.set_timesteps(NUM_STEPS)
        return [float(t) for t in self.pipe.scheduler.timesteps]

    @torch.no_grad()
    def step(self, passes: int = 2) -> Tensor:
        """The first denoising step of a run: the passes of guidance, their sum, and the solver."""
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(NUM_STEPS, device=self.latents.device)
        scheduler.set_begin_index(0)
        timestep = scheduler.timesteps[0]
        made = [self.forward(timestep, text) for text in self.texts[:passes]]
        noise = made[0] if passes == 1 else made[1] + GUIDANCE * (made[0] - made[1])
        return scheduler.step(noise, timestep, self.latents, return_dict=False)[0]

    def forward(self, timestep: Tensor, text: Tensor) -> Tensor:
        """One pass of the transformer."""
        latents = self.latents.to(self.pipe.transformer.dtype)
        kwargs = {"hidden_states": latents, "timestep": timestep.expand(1), "encoder_hidden_states": text}
        return self.pipe.transformer(**kwargs, return_dict=False)[0]


def make_subject(bench: Bench, *, layers: int | None = None) -> Subject:
    """The published configuration, or a tiny one; `layers` cuts its depth."""
    config = PUBLISHED[MODEL]["transformer"] | (SMALL_TRANSFORMER if bench.small else {})
    config |= {"num_layers": layers} if layers else {}
    torch.manual_seed(0)
    with bench.device:
        transformer = WanTransformer3DModel.from_config(config).eval().requires_grad_(False)
    for name, parameter in list(transformer.named_parameters()):  # as from_pretrained does it
        owner, _, leaf = name.rpartition(".")
        kept = any(part in name.split(".") for part in transformer._keep_in_fp32_modules)
        cast = torch.nn.Parameter(parameter.to(torch.float32 if kept else bench.dtype), requires_grad=False)
        setattr(transformer.get_submodule(owner), leaf, cast)
    scheduler = UniPCMultistepScheduler.from_config(PUBLISHED[MODEL]["scheduler"], flow_shift=FLOW_SHIFT)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    shape, tokens = (1, 16, 7, 8, 8) if bench.small else LATENTS, 8 if bench.small else TEXT_TOKENS
    latents = torch.randn(shape, device=bench.device)
    texts = torch.randn(2, 1, tokens, config["text_dim"], device=bench.device, dtype=bench.dtype)
    return Subject(pipe=pipe, latents=latents, texts=(texts[0], texts[1]), window_frames=3 if bench.small else WINDOW)


@contextmanager
def stepping(
    subject: Subject,
    method: Method | None,
    *,
    kernel: str,
    dual: str = "auto",
    passes: int = 2,
    ranks: Ranks | None = None,
) -> Iterator[Callable[[], Tensor]]:
    """One step by a method, which is applied outside the timed call; None is stock diffusers."""
    with ExitStack() as stack:
        if method is not None:
            window = subject.window_frames
            stack.enter_context(
                apply_method(subject.pipe, method=method, window_frames=window, kernel=kernel, dual=dual, ranks=ranks)
            )
        yield lambda: subject.step(passes)


def make_vae(bench: Bench) -> Any:
    """Wan's VAE in fp32 with random weights, or a tiny one."""
    config = PUBLISHED[MODEL]["vae"] | (SMALL_VAE if bench.small else {})
    torch.manual_seed(0)
    with bench.device:
        return AutoencoderKLWan.from_config(config).eval().requires_grad_(False)
