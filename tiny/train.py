"""Trains the embedded model from nothing: `python -m tiny.train`, or continues where the last run was stopped.

Four stages, each with its state in the work folder: the autoencoder, the cached latents, the transformer with its text encoder,
and the decoder of the autoencoder once more.
The result is a checkpoint in Diffusers layout that `WanPipeline.from_pretrained` loads.
"""

import argparse
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tiny.export import export
from tiny.latents import cache_latents
from tiny.train_flow import FlowPlan, train_flow
from tiny.train_vae import DECODER_PLAN, VaePlan, train_decoder, train_vae

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All sizes of a training run; the defaults made the shipped weights."""

    vae: VaePlan = field(default_factory=VaePlan)
    num_clips: int = 5120
    clips_per_file: int = 256
    flow: FlowPlan = field(default_factory=FlowPlan)
    decoder: VaePlan = DECODER_PLAN


def train(work: Path, target: Path, plan: Plan, device: torch.device) -> None:
    """Runs what is left of the four stages in `work`, and writes the checkpoint to `target`."""
    work.mkdir(parents=True, exist_ok=True)
    train_vae(work, plan.vae, device)
    cache_latents(work, num_clips=plan.num_clips, clips_per_file=plan.clips_per_file, device=device)
    train_flow(work, plan.flow, device)
    train_decoder(work, plan.decoder, device)
    export(work, target)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT.parent / ".train", help="folder of the training state")
    parser.add_argument("--out", type=Path, default=ROOT / "wan", help="folder of the finished checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", filename=args.work / "train.log")
    train(args.work, args.out, Plan(), torch.device(args.device))


if __name__ == "__main__":
    main()
