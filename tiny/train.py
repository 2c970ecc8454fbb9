"""Trains an embedded model from nothing: `python -m tiny.train wan`, or continues where the last run was stopped.

Four stages, each with its state in the work folder: the autoencoder, the cached latents, the transformer with its text encoder,
and the decoder of the autoencoder once more. The last needs the first alone: `--stage decoder` may run beside `--stage flow`, and gives the
same weights.
The result is a checkpoint in Diffusers layout that the family's pipeline loads.
"""

import argparse
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tiny.export import export
from tiny.families import FAMILIES, Family
from tiny.latents import cache_latents
from tiny.train_flow import FlowPlan, train_flow
from tiny.train_vae import DECODER_PLAN, VaePlan, train_decoder, train_vae

ROOT = Path(__file__).resolve().parent

STAGES = ("vae", "latents", "flow", "decoder")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All sizes of a training run."""

    vae: VaePlan = field(default_factory=VaePlan)
    num_clips: int = 5120
    clips_per_file: int = 256
    flow: FlowPlan = field(default_factory=FlowPlan)
    decoder: VaePlan = DECODER_PLAN


# A step of LTX-Video's autoencoder is cheaper, since it works on patches of pixels. Its transformer meets the world as it is now, from the
# first step, and words are learned from stills.
PLANS = {
    "wan": Plan(),
    "ltx": Plan(
        vae=VaePlan(phases=((1, 8, 1000), (9, 4, 2500))),
        flow=FlowPlan(phases=((1, 32, 1000), (5, 12, 1000), (9, 8, 3000))),
        decoder=VaePlan(phases=((9, 4, 500),), lr=5e-4),
    ),
}
"""The plans that made the shipped weights, and those that are still on their way."""


def train(family: Family, work: Path, target: Path, plan: Plan, device: torch.device) -> None:
    """Runs what is left of the four stages in `work`, and writes the checkpoint to `target`."""
    for stage in STAGES:
        run_stage(stage, family, work, plan, device)
    export(family, work, target)


def run_stage(stage: str, family: Family, work: Path, plan: Plan, device: torch.device) -> None:
    """Runs what is left of one stage; the earlier ones must be done, but the decoder needs the autoencoder alone."""
    work.mkdir(parents=True, exist_ok=True)
    if stage == "vae":
        train_vae(family, work, plan.vae, device)
    elif stage == "latents":
        cache_latents(family, work, num_clips=plan.num_clips, clips_per_file=plan.clips_per_file, device=device)
    elif stage == "flow":
        train_flow(family, work, plan.flow, device)
    else:
        train_decoder(family, work, plan.decoder, device)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES), help="which embedded model")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone and write no checkpoint")
    parser.add_argument("--work", type=Path, help="folder of the training state (default: .train/FAMILY)")
    parser.add_argument("--out", type=Path, help="folder of the finished checkpoint (default: tiny/FAMILY)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    work = args.work or ROOT.parent / ".train" / args.family
    work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", filename=work / "train.log")
    family, plan, device = FAMILIES[args.family], PLANS[args.family], torch.device(args.device)
    if args.stage:
        run_stage(args.stage, family, work, plan, device)
    else:
        train(family, work, args.out or ROOT / args.family, plan, device)


if __name__ == "__main__":
    main()
