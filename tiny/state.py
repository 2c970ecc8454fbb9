"""The state of a training run in one safetensors file: weights, averaged weights, Adam's moments and the step.

Randomness is no part of it: every step draws from generators seeded by its own number, so a resumed run repeats an unbroken one.
"""

import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class Trainee:
    """A module under training with its Adam optimizer and the exponential moving average (EMA) of its weights."""

    def __init__(self, module: nn.Module, *, lr: float, ema_decay: float) -> None:
        self.module = module
        self.lr = lr
        self.ema_decay = ema_decay
        self.named = dict(module.named_parameters())
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.ema = {name: value.detach().clone() for name, value in self.named.items()}
        self.step = 0
        self.seconds = 0.0
        self._resumed_at = time.monotonic()

    def update(self, loss: Tensor, *, lr_scale: float) -> None:
        """One optimizer step on a scalar loss, with clipped gradients; then the average follows the weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_scale
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimizer.step()
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
        for name, value in self.named.items():
            # Empty for a weight that had no gradient yet (the convolutions over time, while stills are trained).
            tensors |= {f"{key}.{name}": moment.contiguous() for key, moment in self.optimizer.state[value].items()}
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata={"step": str(self.step), "seconds": f"{self.seconds:.0f}"})
        part.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Continues from a state written by `save`."""
        with safe_open(path, "pt") as state:
            self.step, self.seconds = int(state.metadata()["step"]), float(state.metadata()["seconds"])
            names = set(state.keys())
            for name, value in self.named.items():
                value.copy_(state.get_tensor(f"weight.{name}"))
                self.ema[name].copy_(state.get_tensor(f"ema.{name}"))
                if f"step.{name}" in names:
                    moments = {key: state.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                    moments = {key: moment.to(value.device) for key, moment in moments.items()}
                    self.optimizer.state[value] = moments | {"step": state.get_tensor(f"step.{name}")}


@torch.no_grad()
def load_average(module: nn.Module, path: Path) -> None:
    """Fills a module with the averaged weights of a saved state."""
    with safe_open(path, "pt") as state:
        for name, value in module.named_parameters():
            value.copy_(state.get_tensor(f"ema.{name}"))


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
