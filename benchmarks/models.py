"""Write docs/models.md: the models that the engine serves, their layouts, and what the planner predicts of each on GPUs."""

from pathlib import Path
from typing import Any

from benchmarks.predicted import predicted_table
from benchmarks.report import PREDICTED, load_preset, table
from engine.adapters import ModelAdapter
from engine.config import RunConfig
from engine.planner.gpu import read_gpu
from engine.planner.layout import feasible_degrees, num_passes
from engine.planner.model import ModelSpec, read_model

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
GPUS = ("h200", "h100", "a100", "rtx4090")
SHOWN = ("direct", "sliding_window", "freespec")
RANKS = (1, 2, 4, 8, 16)
INTRO = """
# Models

Written by `python -m benchmarks.models` from the checkpoints' published configurations; do not edit. No weight is read and no GPU is
needed: **every figure of memory and time on this page is predicted by the planner, none is measured.** `launch/plan.py --config CONFIG
--gpus N --gpu NAME` shows the same for your own video, with every arrangement of ranks and the bytes that each sends.
"""
FAMILIES = """
A model.path may be a hub name or a folder in Diffusers layout. LTX-Video 0.9.0 to 0.9.6 (the dev ones, not the distilled ones, which want
timesteps of their own) share the transformer; from 0.9.1 on the VAE is told a timestep (`decode.timestep`, `decode.noise_scale`), from
0.9.5 on the scheduler's shift is a fixed number. Another family is a new adapter: [adding-a-model.md](adding-a-model.md).
"""
LOADING = """
## Where weights come from

| setting | what it does |
| --- | --- |
| `model.path` | a hub name or a folder in Diffusers layout |
| `model.revision` | branch, tag or commit of a hub name; the record has the commit that it meant |
| `model.offline` | never asks the hub: what its local copy does not hold is an error (`HF_HUB_OFFLINE=1` is heard as well) |
| `model.single_file` | a .safetensors file as the authors publish it, here or on the hub, in place of the transformer (LTX-Video: and VAE) |

Only safetensors are read. Pickles (`.bin`, `.pt`, `.pth`, `.ckpt`, `.pkl`) are refused by name, and never downloaded. Before anything is
loaded, every tensor of every part is held against the part's `config.json`: a missing or surplus tensor, another shape, a file that is
cut short, a shard that is not there, a download that did not finish and a pointer of git-lfs are one line each. The record of a run
has the commit of a hub checkpoint, or the SHA-256 of every file that is loaded of a folder, and that of a single file; for the latter two the files
are read once more when they are loaded.

A single file takes its configuration, scheduler, tokenizer and text encoder from `model.path`, and on the hub its name is
ORGANISATION/NAME/FILE. LTX-Video 0.9.6 dev is published as a file, and is 0.9.5 with other weights:

    python launch/generate.py --config configs/ltx-video-2b.yaml --model.path Lightricks/LTX-Video-0.9.5 \\
        --model.single_file Lightricks/LTX-Video/ltxv-2b-0.9.6-dev-04-25.safetensors --prompt "..."

Files with fp8 or other quantised tensors are refused. diffusers rounds some parts of Wan's transformer that it keeps in fp32 when it
reads a folder; here a file and a folder with the same weights give the same tensors, to the bit. Tested with small random models in
both layouts, and, by names and shapes alone, with the real configurations of Wan2.1 1.3B and 14B and LTX-Video 0.9.0, 0.9.1 and 0.9.5.

## Attention kernels

`attention.kernel` names one of torch's own (`cuda_flash`, `cuda_cudnn`, `cuda_efficient`, `cpu_flash`, `plain`) or `cuda_fa3`, FlashAttention 3
where it is installed. `auto`, the default, has these candidates on CUDA in bf16 and fp16, in torch's own order:

| GPU | candidates |
| --- | --- |
| compute capability 9.0 and 10.0 (H100, H200, B200) | `cuda_cudnn`, `cuda_flash`, `cuda_fa3` |
| others from 8.0 on | `cuda_flash`, `cuda_cudnn`, `cuda_fa3` |
| older, and any in fp32 | `cuda_efficient` |

cuDNN is one of them, and may be named, from version 9.15.1 on: older ones read out of bounds where 128 does not divide the number of tokens.
When an engine starts, rank 0 runs each candidate for a moment on a part of a layer at the video's own shape, global and dual, strided windows
included. One that differs from plain attention by more than rounding cannot win. The first stays unless another takes
less than 0.9 of its time: near a tie two processes would choose by chance, and their videos differ by rounding. All ranks use rank 0's choice,
and the record has its name, every time and every refusal (`attention`); a batch whose replicas are to agree to the bit on different
machines names its kernel. On a CPU and in fp32 there is one kernel to choose from. `launch/plan.py` predicts with the same candidates and
the same rule, from the rates in `configs/gpus/`. `apply_method` on a pipeline of your own takes the first candidate that is right,
tried out at its first long video; if that is not torch's choice, a line on stderr says why.

A video of native length is computed by torch's `scaled_dot_product_attention` itself, whatever the kernel: the result is the stock pipeline's,
bit for bit, under any backend that torch takes or a `torch.nn.attention.sdpa_kernel` context asks for.

FlexAttention is a baseline of `benchmarks/gpu.py` and no kernel: it wants a block mask of the whole sequence where strided views need
none, and is fast only when it is compiled for each shape. The choice was tested on CPUs, and not yet run on a GPU.

The eigendecompositions of the fusion are torch's. From torch 2.12 on, which the package asks for, a GPU does them in one batch; before, one by
one, which took 0.6 s for 128 matrices of 128 x 128 (pytorch issue 175585). A torch 2.11 that is there anyway is used: at the start the loop,
LAPACK on several threads of the host and cuSOLVER's batched Jacobi through CuPy, where that is installed, are timed on the run's own shape, and
a line on stderr and the record (`eigensolver`) say which was taken. On a GPU every decomposition is checked: vectors that are not orthonormal,
or are not those of their matrix (pytorch issue 192483 reports such), end the run on all ranks with one line.

`model.compile true` puts the transformer's blocks through torch.compile, once for each kind of step (two for freespec), also after another
method was put on. Each branch of attention and the eigendecomposition are one operator of their own in it, so that no window is written out;
tests run the graphs and read Inductor's code for a CPU. Not timed on a GPU.

`model.weights cpu_offload` was tested with a CPU in the GPU's place (which parts move, in what order, and that the video is the same, on one rank and on two); its
memory and time on GPUs are not measured.

## Quantised attention

`attention.complement sage` attends to the keys outside the windows with SageAttention (int8 products), in dual steps only: the local
branch and global steps stay as they are. It wants CUDA, bf16 or fp16, heads of at most 128 channels and `attention.dual strided`, and is
refused in one line elsewhere. The package index has version 1, which returns no log-sum-exp and is refused; build version 2 from
[its sources](https://github.com/thu-ml/SageAttention) (users reported a fault of 2.2.0 on Hopper that was mended after it). The record says
`complement: sage` and the package's version. Keys are quantised in blocks as they lie on a rank: over a ring, and where a shard cuts
a frame, the video differs between numbers of ranks by what int8 costs. Neither speed nor quality was measured, for want of a GPU, and the
planner counts the complement like any other attention.
"""
LAYOUTS = """
Heads that ulysses does not divide are possible where ring is 1, and cost what the busiest rank has more than the mean. Arrangements are
cfg x ring x ulysses; with guidance cfg may be 2. freenoise, freelong and freepca attend inside views and need ring 1.
"""
PREDICTIONS = """
Peak GiB is what the busiest GPU must hold: weights in bf16, text encoder (on GPU 0 only; `parallel.text_device cpu` and
`model.weights cpu_offload` make room), the worst moment of a forward, or decoding whole frames on GPU 0, in the mode that fits. Seconds are for the
preset's steps with guidance; from datasheets and assumed fractions of them, whose sources are in `configs/gpus/`. The time of the fusion's
eigendecompositions is assumed to grow with a head's channels and not to fall with the heads of a rank, which weighs on LTX-Video: its 20,130
tokens make attention so cheap that over 8 GPUs the fusion is a third of a predicted dual step.
What does not fit may with `model.weights zero3`, which shares the weights out: [memory.md](memory.md#weights).
"""


def page() -> str:
    """The text of docs/models.md."""
    configs = [load_preset(path) for path in PREDICTED]
    specs = [read_model(config.model) for config in configs]
    parts = [
        INTRO.strip(),
        table(*families(configs, specs)),
        FAMILIES.strip(),
        LOADING.strip(),
        "## Layouts",
        table(*layouts(configs, specs)),
        LAYOUTS.strip(),
        "## Predicted memory and time",
        PREDICTIONS.strip(),
        table(*predictions(configs)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


def families(configs: list[RunConfig], specs: list[ModelSpec]) -> tuple[list[str], list[list[str]]]:
    """What each model is."""
    rows = []
    for path, config, spec in zip(PREDICTED, configs, specs, strict=True):
        frames, frame_tokens = spec.grid(config.video.num_frames, config.video.height, config.video.width)
        rows.append(
            [
                spec.name,
                spec.adapter.pipeline_class.__name__,
                f"{spec.parameters['transformer'] / 1e9:.2f}",
                f"{spec.parameters['text_encoder'] / 1e9:.2f}",
                f"{spec.layers} x {spec.heads} x {spec.head_dim}",
                f"{config.method.window_frames} ({spec.video.native_frames(config.method.window_frames)})",
                f"{config.video.num_frames} of {config.video.height} x {config.video.width}",
                f"{frames} x {frame_tokens}",
                describe_guidance(spec.adapter),
                ", ".join(spec.adapter.decode_modes),
                f"`configs/{path.name}`",
            ]
        )
    header = [
        "model",
        "pipeline",
        "transformer, 10⁹",
        "text encoder, 10⁹",
        "layers x heads x D",
        "native latents (frames)",
    ]
    header += ["preset's video", "latents x tokens", "guidance", "decode modes", "preset"]
    return header, rows


def describe_guidance(adapter: ModelAdapter) -> str:
    """How many forwards a step is."""
    return "a batch of 2" if adapter.batches_guidance else "2 forwards"


def layouts(configs: list[RunConfig], specs: list[ModelSpec]) -> tuple[list[str], list[list[str]]]:
    """Arrangements of the ranks, with those of uneven heads in italics."""
    rows = []
    for config, spec in zip(configs, specs, strict=True):
        frames, frame_tokens = spec.grid(config.video.num_frames, config.video.height, config.video.width)
        passes = num_passes(config.sampler)
        cells = []
        for world in RANKS:
            found = feasible_degrees(world, heads=spec.heads, passes=passes, tokens=frames * frame_tokens)
            names = ["x".join(map(str, degrees)) for degrees in found]
            uneven = [spec.heads % degrees[2] != 0 for degrees in found]
            cells.append(", ".join(f"*{name}*" if odd else name for name, odd in zip(names, uneven, strict=True)))
        rows.append([spec.name.partition("/")[2], *cells])
    return ["model", *(f"{world} ranks" if world > 1 else "1 rank" for world in RANKS)], rows


def predictions(configs: list[RunConfig]) -> tuple[list[str], list[list[str]]]:
    """The planner's best arrangement of each model on each GPU."""
    header = [
        "model",
        "GPU",
        "GPUs",
        "best cfg x ring x ulysses (predicted)",
        "peak GiB (predicted)",
        "weights + text GiB",
    ]
    header += [f"{name}, s (predicted)" for name in SHOWN] + [
        "decode, s (predicted)",
        "efficiency, freespec (predicted)",
    ]
    return header, [predicted_row(row) for row in predicted_table(configs, [read_gpu(name) for name in GPUS])]


def predicted_row(row: dict[str, Any]) -> list[str]:
    """One row of numbers as words; what does not fit has no time."""
    named = [row["model"].partition("/")[2], row["gpu"], str(row["gpus"])]
    if not row["fits"]:
        return [*named, "does not fit", f"{row['peak_gib']:.1f}", weights(row), *["-"] * (len(SHOWN) + 2)]
    seconds = [f"{row[f'seconds_{name}']:.0f}" if f"seconds_{name}" in row else "-" for name in SHOWN]
    return [
        *named,
        row["degrees"],
        f"{row['peak_gib']:.1f}",
        weights(row),
        *seconds,
        f"{row['seconds_decode']:.0f} ({row['decode_mode']})",
        f"{row['efficiency_freespec']:.0%}",
    ]


def weights(row: dict[str, Any]) -> str:
    """GiB of weights, and of the text encoder on top."""
    return f"{row['weights_gib']:.1f} + {row['text_gib']:.1f}"


if __name__ == "__main__":
    main()
