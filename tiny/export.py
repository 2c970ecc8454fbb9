"""Write the trained parts as a checkpoint in Diffusers layout."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from tiny.families import Family
from tiny.families.base import assemble_pipeline, build_tokenizer
from tiny.latents import load_latents
from tiny.state import load_average, training_record


def build_pipeline(family: Family, work: Path) -> DiffusionPipeline:
    """The pipeline with the averaged weights found in `work`, float32 on the CPU."""
    _, mean, std = load_latents(work)
    vae = family.build_vae(mean, std)
    load_average(vae, work / "decoder.safetensors")
    denoiser = family.build_denoiser(len(build_tokenizer(family.pipeline_text_length)))
    load_average(denoiser, work / "flow.safetensors")
    return assemble_pipeline(family, vae, denoiser)


def export(family: Family, work: Path, target: Path) -> None:
    """Save the checkpoint with bfloat16 weights; an existing folder is replaced only by a complete new one."""
    pipe = build_pipeline(family, work)
    for part in (pipe.vae, pipe.text_encoder, pipe.transformer):
        for parameter in part.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    fresh, old = target.with_name(target.name + ".part"), target.with_name(target.name + ".old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(fresh)
    record = {stage: training_record(work / f"{stage}.safetensors") for stage in ("vae", "flow", "decoder")}
    (fresh / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors creates files that only their owner can read
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
