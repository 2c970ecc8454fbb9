"""The state of a training run in one safetensors file: weights, averaged weights, the optimizers' moments and the step.

It holds no random state: every step draws from generators seeded by its number, so that a resumed run repeats an uninterrupted one.
"""

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")
"""Optimizer state of a weight: AdamW has the first three, Muon the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """How one stage is trained.

    Attributes:
        phases: (frames per clip, clips per batch, steps) of each phase; the transformer's frames are latent frames.
        lr: peak learning rate.
        save_every: steps between saved states.
        compiled: whether torch compiles the transformer's blocks, once per phase and length of text.
    """

    phases: tuple[tuple[int, int, int], ...]
    lr: float = 1.5e-3
    save_every: int = 100
    compiled: bool = True

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return sum(steps for _, _, steps in self.phases)


class Trainee:
    """A module under training with its optimizers and the exponential moving average (EMA) of its weights.

    Matrices whose name contains one of the strings in `muon` are trained with Muon, which needs about half the steps; all other weights
    with AdamW. Both take the same learning rate.
    """

    def __init__(self, module: nn.Module, *, lr: float, ema_decay: float, muon: tuple[str, ...] = ()) -> None:
        self.module = module
        self.lr = lr
        self.ema_decay = ema_decay
        self.named = dict(module.named_parameters())
        self.ema = {name: value.detach().clone() for name, value in self.named.items()}
        self.step = 0
        self.seconds = 0.0
        self._resumed_at = time.monotonic()
        matrices = [value for name, value in self.named.items() if value.ndim == 2 and any(key in name for key in muon)]
        chosen = set(matrices)
        others = [value for value in self.named.values() if value not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        ]
        if matrices:
            muon_lr = {"lr": lr, "adjust_lr_fn": "match_rms_adamw"}
            self.optimizers.append(torch.optim.Muon(matrices, weight_decay=0.01, momentum=0.95, **muon_lr))

    def update(self, loss: Tensor, *, lr_scale: float) -> None:
        """One optimizer step on a scalar loss, with clipped gradients, and an update of the average."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * lr_scale
            optimizer.step()
        self.step += 1
        now = time.monotonic()
        self.seconds, self._resumed_at = self.seconds + now - self._resumed_at, now
        # A short memory at first, or the random start would stay in the average for long.
        decay = min(self.ema_decay, self.step / (self.step + 20))
        averages, weights = list(self.ema.values()), [value.detach() for value in self.named.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def save(self, path: Path) -> None:
        """Write the state under a temporary name and rename it, so that a killed run leaves the last complete state."""
        tensors = {f"weight.{name}": value.detach().contiguous() for name, value in self.named.items()}
        tensors |= {f"ema.{name}": value.contiguous() for name, value in self.ema.items()}
        names = {value: name for name, value in self.named.items()}
        for optimizer in self.optimizers:
            # A weight without a gradient so far (a convolution over time, while stills are trained) has no moments.
            for value, moments in optimizer.state.items():
                tensors |= {f"{key}.{names[value]}": moment.contiguous() for key, moment in moments.items()}
        metadata = {"step": str(self.step), "seconds": f"{self.seconds:.0f}", "device": device_name()}
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata=metadata)
        part.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Continue from a state that `save` wrote."""
        with safe_open(path, "pt") as state:
            self.step, self.seconds = int(state.metadata()["step"]), float(state.metadata()["seconds"])
            for name, value in self.named.items():
                value.copy_(state.get_tensor(f"weight.{name}"))
                self.ema[name].copy_(state.get_tensor(f"ema.{name}"))
            saved, names = set(state.keys()), {value: name for name, value in self.named.items()}
            for optimizer in self.optimizers:
                for value in (value for group in optimizer.param_groups for value in group["params"]):
                    keys = {key: f"{key}.{names[value]}" for key in MOMENTS}
                    moments = {key: state.get_tensor(place) for key, place in keys.items() if place in saved}
                    # AdamW keeps its count of steps on the CPU.
                    optimizer.state[value] = {k: m if k == "step" else m.to(value.device) for k, m in moments.items()}


def train_steps(
    trainee: Trainee,
    path: Path,
    plan: StagePlan,
    loss_of: Callable[[int, int, int], tuple[Tensor, float]],
    *,
    warmup: int,
    describe: Callable[[float], str],
) -> None:
    """Train from the state in `path`, if there is one, to the end of the plan, and save the state on the way.

    `loss_of` takes a step, its frames and its clips, and returns the loss and a number, whose running mean `describe` puts into words.
    """
    if path.exists():
        trainee.load(path)
    stage, mean = path.stem, 0.0
    begun = trainee.step
    progress = tqdm(range(begun, plan.num_steps), desc=stage, initial=begun, total=plan.num_steps)
    for step in progress:
        num_frames, num_clips = phase_at(plan.phases, step)
        loss, shown = loss_of(step, num_frames, num_clips)
        trainee.update(loss, lr_scale=warm_and_decay(step, plan.num_steps, warmup=warmup, decay_from=0.6))
        mean += max(0.03, 1 / (step - begun + 1)) * (shown - mean)
        progress.set_postfix_str(f"{describe(mean)}, {num_frames} frames", refresh=False)
        if trainee.step % plan.save_every == 0 or trainee.step == plan.num_steps:
            trainee.save(path)
            logger.info("%s step %d: %s after %.0f s", stage, trainee.step, describe(mean), trainee.seconds)


@torch.no_grad()
def load_average(module: nn.Module, path: Path) -> None:
    """Fill a module with the averaged weights of a saved state."""
    with safe_open(path, "pt") as state:
        for name, value in module.named_parameters():
            value.copy_(state.get_tensor(f"ema.{name}"))


def device_name() -> str:
    """Name the training device for the model card."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU cores ({platform.machine()})"


def training_record(path: Path) -> dict[str, str | float]:
    """Steps, minutes and device of a saved state."""
    with safe_open(path, "pt") as state:
        saved = state.metadata()
    return {"steps": int(saved["step"]), "minutes": round(float(saved["seconds"]) / 60, 1), "device": saved["device"]}


def numpy_rng(*key: int) -> np.random.Generator:
    """A numpy generator for one purpose and step, such as `numpy_rng(stage, step)`."""
    return np.random.default_rng(key)


def torch_rng(*key: int) -> torch.Generator:
    """A CPU torch generator for one purpose and step."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def warm_and_decay(step: int, num_steps: int, *, warmup: int, decay_from: float) -> float:
    """Scale of the learning rate: linear warm-up, a plateau, then a linear descent to 2 % over the last part of the run."""
    rise = min(1.0, (step + 1) / warmup)
    descent = min(1.0, (num_steps - step) / (num_steps * (1 - decay_from)))
    return rise * max(0.02, descent)


def phase_at(phases: tuple[tuple[int, int, int], ...], step: int) -> tuple[int, int]:
    """(frames, clips per batch) of a step, in phases of (frames, clips per batch, steps)."""
    for frames, clips, steps in phases:
        if step < steps:
            return frames, clips
        step -= steps
    raise ValueError(f"step {step} is past the last of the phases {phases}")
