"""The state of a training run in one safetensors file: weights, averaged weights, the optimizers' moments and the step.

Randomness is no part of it: every step draws from generators seeded by its own number, so a resumed run repeats an unbroken one.
"""

import platform
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")
"""What AdamW (the first three) and Muon keep for a weight."""


class Trainee:
    """A module under training with its optimizers and the exponential moving average (EMA) of its weights.

    Weights whose name holds one of the strings in `muon` are trained with Muon, which needs about half the steps on the matrices of a
    transformer; all others with AdamW. Both take the same learning rate.
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
        """One optimizer step on a scalar loss, with clipped gradients; then the average follows the weights."""
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
        """Writes the state under a temporary name first, so that a kill leaves the last whole state."""
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
        """Continues from a state written by `save`."""
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


@torch.no_grad()
def load_average(module: nn.Module, path: Path) -> None:
    """Fills a module with the averaged weights of a saved state."""
    with safe_open(path, "pt") as state:
        for name, value in module.named_parameters():
            value.copy_(state.get_tensor(f"ema.{name}"))


def device_name() -> str:
    """The device that trains here, for the model card."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU cores ({platform.machine()})"


def training_record(path: Path) -> dict[str, str | float]:
    """Steps, minutes and device of a saved state."""
    with safe_open(path, "pt") as state:
        saved = state.metadata()
    return {"steps": int(saved["step"]), "minutes": round(float(saved["seconds"]) / 60, 1), "device": saved["device"]}


def numpy_rng(*key: int) -> np.random.Generator:
    """A numpy generator for one purpose and step, e.g. `numpy_rng(stage, step)`."""
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
