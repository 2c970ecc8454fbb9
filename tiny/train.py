"""Train an embedded model from scratch, or continue a stopped run: `python -m tiny.train wan`.

Four stages, each with its state in the work folder: the autoencoder, the cached latents, the transformer with its text encoder,
and the decoder of the autoencoder again. The last depends on the first alone, so that `--stage decoder` may run beside `--stage flow`
and gives the same weights. The result is a checkpoint in Diffusers layout that the family's pipeline loads.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from tiny.export import export
from tiny.families import FAMILIES, Family
from tiny.latents import cache_latents
from tiny.state import StagePlan
from tiny.train_flow import FLOW_PLAN, train_flow
from tiny.train_vae import DECODER_PLAN, VAE_PLAN, train_decoder, train_vae

ROOT = Path(__file__).resolve().parent

STAGES = ("vae", "latents", "flow", "decoder")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All sizes of a training run."""

    vae: StagePlan = VAE_PLAN
    num_clips: int = 5120
    clips_per_file: int = 256
    flow: StagePlan = FLOW_PLAN
    decoder: StagePlan = DECODER_PLAN


# A step of LTX-Video's autoencoder is cheaper, since it works on patches of pixels. Its transformer learns words from stills.
PLANS = {
    "wan": Plan(),
    "ltx": Plan(
        vae=StagePlan(phases=((1, 8, 1000), (9, 4, 2500)), save_every=200),
        flow=StagePlan(phases=((1, 32, 1000), (5, 12, 1000), (9, 8, 3000))),
        decoder=StagePlan(phases=((9, 4, 500),), lr=5e-4, save_every=200),
    ),
}
"""The plans of the shipped weights."""


def run_stage(
    stage: str, family: Family, work: Path, plan: Plan, device: torch.device, *, begin: Path | None = None
) -> None:
    """Run what is left of one stage; the earlier ones must be done, except that the decoder needs only the autoencoder.

    Autoencoder and transformer begin with the weights of the checkpoint in the folder `begin`, if it is given.
    """
    work.mkdir(parents=True, exist_ok=True)
    if stage == "vae":
        train_vae(family, work, plan.vae, device, begin)
    elif stage == "latents":
        cache_latents(family, work, num_clips=plan.num_clips, clips_per_file=plan.clips_per_file, device=device)
    elif stage == "flow":
        train_flow(family, work, plan.flow, device, begin)
    else:
        train_decoder(family, work, plan.decoder, device)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES), help="which embedded model")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone and write no checkpoint")
    parser.add_argument("--work", type=Path, help="folder of the training state (default: .train/FAMILY)")
    parser.add_argument("--out", type=Path, help="folder of the finished checkpoint (default: tiny/FAMILY)")
    parser.add_argument("--begin", type=Path, help="folder of a checkpoint whose weights a new training begins with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    work = args.work or ROOT.parent / ".train" / args.family
    work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", filename=work / "train.log")
    family, plan, device = FAMILIES[args.family], PLANS[args.family], torch.device(args.device)
    for stage in [args.stage] if args.stage else STAGES:
        run_stage(stage, family, work, plan, device, begin=args.begin)
    if not args.stage:
        export(family, work, args.out or ROOT / args.family)


if __name__ == "__main__":
    main()
