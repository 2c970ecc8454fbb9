"""Distil the embedded Wan2.1 into a LoRA for four steps without guidance: `python -m tiny.distill`.

The teacher is the checkpoint itself, in twelve steps with guidance. Of each of its runs the latents before every third step are kept;
the student learns the mean velocity from each to the next, so that four steps of Euler walk the teacher's path. What was made is kept in the
work folder, and a stopped run goes on from there.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

from tiny.evaluate import GUIDANCE, evaluation_scenes, match_rates
from tiny.families import FAMILIES
from tiny.families.base import FLOW_SHIFT, LATENT_FRAMES, NATIVE_FRAMES, TEXT_LENGTH, load_pipeline
from tiny.measure import read
from tiny.state import numpy_rng, torch_rng, warm_and_decay
from tiny.world import SIZE, caption, sample_scene

ROOT = Path(__file__).resolve().parent
SEED = 21
TEACHER_STEPS, EVERY = 12, 3
# The noise levels before the teacher's steps 0, 3, 6 and 9: 1, 0.9, 0.75, 0.5, as the scheduler shifts 1, 3/4, 1/2, 1/4.
LEVELS = tuple(FLOW_SHIFT * s / (1 + (FLOW_SHIFT - 1) * s) for s in (1.0, 0.75, 0.5, 0.25))
RANK = 16
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
FILE = "wan-4steps.safetensors"
SHOWN = ("shape_and_colour", "size", "motion", "speed", "background", "pan")  # in the card


def teacher_paths(pipe: WanPipeline, prompts: list[str], index: int) -> tuple[Tensor, Tensor]:
    """Run the teacher: latents [B, 5, z, F, h, w] at `LEVELS` and at the end, and the text [B, K, C]."""
    kept: list[Tensor] = []

    def keep(_pipe: WanPipeline, step: int, _timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if (step + 1) % EVERY == 0:
            kept.append(tensors["latents"].clone())
        return {}

    text, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    shape = (len(prompts), pipe.transformer.config.in_channels, LATENT_FRAMES, SIZE // 4, SIZE // 4)
    noise = torch.randn(shape, generator=torch_rng(SEED, index))
    pipe(
        prompt=prompts,
        height=SIZE,
        width=SIZE,
        num_frames=NATIVE_FRAMES,
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=GUIDANCE,
        latents=noise,
        output_type="latent",
        max_sequence_length=TEXT_LENGTH,
        callback_on_step_end=keep,
    )
    return torch.stack([noise, *kept], dim=1), text


def make_paths(pipe: WanPipeline, work: Path, *, num_files: int, batch: int = 4) -> tuple[Tensor, Tensor]:
    """The teacher's paths and their texts, a file for each batch of captions that training may see."""
    made = []
    for index in tqdm(range(num_files), desc="teacher"):
        file = work / f"paths-{index:03d}.safetensors"
        if not file.exists():
            rng = numpy_rng(SEED, index)
            prompts = [caption(sample_scene(rng, held_out=False), rng) for _ in range(batch)]
            latents, text = teacher_paths(pipe, prompts, index)
            save_file({"latents": latents.contiguous(), "text": text.contiguous()}, file)
        made.append(load_file(file))
    return torch.cat([each["latents"] for each in made]), torch.cat([each["text"] for each in made])


def train(pipe: WanPipeline, paths: Tensor, text: Tensor, *, num_steps: int, batch: int = 8, lr: float = 2e-3) -> None:
    """Train a LoRA in the pipeline's transformer."""
    torch.manual_seed(SEED)
    transformer = pipe.transformer
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS, init_lora_weights="gaussian"))
    learned = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    levels, pairs = torch.tensor((*LEVELS, 0.0)), len(paths) * len(LEVELS)
    order = torch.cat(
        [torch.randperm(pairs, generator=torch_rng(SEED, 10_000 + e)) for e in range(num_steps * batch // pairs + 1)]
    )
    bar = tqdm(range(num_steps), desc="student")
    for step in bar:
        chosen = order[step * batch : (step + 1) * batch]
        which, stage = chosen // len(LEVELS), chosen % len(LEVELS)
        start, end = paths[which, stage], paths[which, stage + 1]
        width = (levels[stage] - levels[stage + 1])[:, None, None, None, None]
        predicted = transformer(start, 1000 * levels[stage], text[which], return_dict=False)[0]
        loss = mse_loss(predicted, (start - end) / width)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_and_decay(step, num_steps, warmup=20, decay_from=0.3)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}")


def save(pipe: WanPipeline, file: Path) -> None:
    """Write the LoRA in bf16, with diffusers' names."""
    state = get_peft_model_state_dict(pipe.transformer)
    save_file({f"transformer.{key}": tensor.to(torch.bfloat16).contiguous() for key, tensor in state.items()}, file)


@torch.no_grad()
def measure(pipe: WanPipeline, *, num_clips: int, steps: int, guidance: float, batch: int = 4) -> dict:
    """Share of held-out captions that the clips show, and seconds of denoising and decoding a clip on this CPU."""
    stock = pipe.scheduler
    if steps == len(LEVELS):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        set_timesteps = pipe.scheduler.set_timesteps
        pipe.scheduler.set_timesteps = lambda *_, **__: set_timesteps(sigmas=list(LEVELS))
    pairs, readings, seconds = evaluation_scenes(num_clips), [], time.process_time()
    for start in tqdm(range(0, num_clips, batch), desc=f"{steps} steps"):
        texts = [text for _, text in pairs[start : start + batch]]
        frames = pipe(
            prompt=texts,
            height=SIZE,
            width=SIZE,
            num_frames=NATIVE_FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(texts))],
            output_type="np",
            max_sequence_length=TEXT_LENGTH,
        ).frames
        readings += [read(255 * clip) for clip in frames]
    pipe.scheduler = stock
    seconds = (time.process_time() - seconds) / num_clips
    rates = match_rates([scene for scene, _ in pairs], readings)
    return {
        "steps": steps,
        "guidance": guidance,
        "cpu_seconds_a_clip": seconds,
        "matches": rates,
    }


_CARD = """# LoRAs of the embedded models

`wan-4steps.safetensors` lets `tiny/wan` denoise in four steps without guidance (`configs/tiny-wan-4steps.yaml`). Its teacher is the model
itself in {teacher} steps with guidance {guidance:g}. `python -m tiny.distill` trains it in {minutes:.0f} minutes on one CPU core: the student learns the mean
velocity from the latents of every {every}rd step to those {every} steps later, on the teacher's runs of {captions} captions. {rank} dimensions a layer, in bfloat16.

Shares of {clips} held-out captions that clips of 33 frames show, read by `tiny/measure.py`, and CPU seconds of a clip with its decoding:

| | {words} | seconds |
|---|{dashes}---|
{rows}
"""


def card(figures: dict) -> str:
    """The text of tiny/loras/README.md, from the measured figures."""
    runs = figures["runs"]
    rows = []
    for name, run in runs.items():
        shares = " | ".join(f"{run['matches'][word]:.0%}" for word in SHOWN)
        rows.append(f"| {name} | {shares} | {run['cpu_seconds_a_clip']:.1f} |")
    return _CARD.format(
        teacher=TEACHER_STEPS,
        guidance=GUIDANCE,
        minutes=figures["cpu_minutes"],
        every=EVERY,
        captions=figures["captions"],
        rank=RANK,
        clips=figures["clips"],
        words=" | ".join(word.replace("_", " ") for word in SHOWN),
        dashes="---|" * len(SHOWN),
        rows="\n".join(rows),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=ROOT.parent / ".train" / "distill", help="folder of the teacher's paths"
    )
    parser.add_argument("--files", type=int, default=48, help="batches of four captions that the teacher shows")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--clips", type=int, default=40, help="held-out captions that are measured")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(FAMILIES["wan"], ROOT / "wan")
    pipe.set_progress_bar_config(disable=True)
    started = time.process_time()
    with torch.no_grad():
        paths, text = make_paths(pipe, args.work, num_files=args.files)
    train(pipe, paths, text, num_steps=args.steps)
    save(pipe, args.work / FILE)
    minutes = (time.process_time() - started) / 60
    pipe.transformer.eval()
    figures = {
        "cpu_minutes": minutes,
        "captions": len(paths),
        "clips": args.clips,
        "runs": {"4 steps with the LoRA": measure(pipe, num_clips=args.clips, steps=4, guidance=1.0)},
    }
    pipe.transformer.disable_lora()
    figures["runs"] |= {
        "4 steps without": measure(pipe, num_clips=args.clips, steps=4, guidance=1.0),
        "20 steps, guidance": measure(pipe, num_clips=args.clips, steps=20, guidance=GUIDANCE),
    }
    (args.work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    tqdm.write(card(figures))


if __name__ == "__main__":
    main()
