"""Environment variables of a rank: its numbers, what it inherits from the driver, and its node. Standard library only."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

# How Ray spreads the bundles of a placement group over nodes.
PlacementStrategy = Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"]
STRATEGIES: tuple[str, ...] = get_args(PlacementStrategy)

# In the environment of a rank: the process id of the launcher that started it, and the pipe for its last line.
LAUNCHER = "FREESPEC_LAUNCHER"
LAST_LINE = "FREESPEC_LAST_LINE"

# In the environment of a rank: the pipe for its events.
EVENTS = "FREESPEC_EVENTS"

# In the environment of rank 0: the listening socket of the store where the ranks meet, whose port the others know.
STORE = "FREESPEC_STORE"

# In the environment of a rank that Ray has placed: the name of its node.
NODE = "FREESPEC_NODE"


# Variables that ranks inherit from the driver, by prefix and by name: communication, kernels, models. Devices (CUDA_VISIBLE_DEVICES) and
# paths (PATH, LD_LIBRARY_PATH) stay those of each node.
CARRIED = (
    *("NCCL_", "GLOO_", "UCX_", "FI_"),
    *("TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32_"),
    *("OMP_", "MKL_", "KMP_", "ATEN_", "ONEDNN_", "DNNL_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DIFFUSERS_", "SAFETENSORS_", "XFUSER_"),
)
CARRIED_NAMES = (
    *("CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_IMPLICIT_TOKEN"),
)
_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIALS")


class RankEnvError(ValueError):
    """RANK, LOCAL_RANK or WORLD_SIZE is invalid."""


@dataclass(frozen=True, kw_only=True)
class RankEnv:
    """The rank of this process, from the environment that torchrun or our launcher set."""

    rank: int
    world: int
    local_rank: int

    @classmethod
    def of_environment(cls) -> "RankEnv | None":
        """Read RANK and WORLD_SIZE; None if unset, RankEnvError if invalid."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        rank, world = _whole_number("RANK"), _whole_number("WORLD_SIZE")
        if rank >= world:
            raise RankEnvError(f"RANK {rank} must be less than WORLD_SIZE {world}; {_REMEDY}")
        return cls(
            rank=rank, world=world, local_rank=_whole_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
        )


def is_first_rank() -> bool:
    """Whether this process is rank 0, or no rank."""
    rank_env = RankEnv.of_environment()
    return rank_env is None or rank_env.rank == 0


_REMEDY = "unset RANK, LOCAL_RANK and WORLD_SIZE, or start with --nproc or torchrun"


def _whole_number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:  # no machine has a billion ranks
        raise RankEnvError(f"{name} must be a whole number, 0 or more, got {text!r}; {_REMEDY}")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of a rank in a placement group.

    Attributes:
        bundle: index of its bundle.
        node: its node.
        local_rank: its number among the ranks of that node.
        local_size: ranks on that node.
    """

    bundle: int
    node: str
    local_rank: int
    local_size: int


def number_ranks(nodes: Sequence[str]) -> list[Slot]:
    """Return slots in rank order for bundles on these `nodes`: by node, then by bundle.

    A mesh expects neighbouring ranks on one node; Ray places bundles in any order. Nodes with more ranks come first, so
    that full nodes stay aligned; ties are broken by the earliest bundle.
    """
    sizes = Counter(nodes)
    order = sorted(sizes, key=lambda node: -sizes[node])
    bundles = [[bundle for bundle, other in enumerate(nodes) if other == node] for node in order]
    return [
        Slot(bundle=bundle, node=node, local_rank=local_rank, local_size=len(mine))
        for node, mine in zip(order, bundles, strict=True)
        for local_rank, bundle in enumerate(mine)
    ]


def rank_environment(
    rank: int, num_ranks: int, *, local_rank: int, local_size: int, address: str, port: int
) -> dict[str, str]:
    """Return the variables of a rank: its numbers, and the address of the rendezvous."""
    found = {"RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    found |= {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_size)}
    found |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return found


def share_cores(num_processes: int) -> dict[str, str]:
    """Return the threads of each of so many processes; {} if they are set in the environment.

    As torchrun does: processes that each take all cores slow each other down by an order of magnitude.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_processes))}


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that ranks on a cluster inherit from the driver; see CARRIED.

    Secrets are left out, since they would cross the network in plain text; set them where Ray is started.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in CARRIED_NAMES or (name.startswith(CARRIED) and not name.endswith(_SECRETS))
    }


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without RANK and the like of another launcher, whose rendezvous the ranks would join."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", NODE)
    prefixes = ("TORCHELASTIC_", "GROUP_", "ROLE_")
    return {name: value for name, value in environment.items() if name not in names and not name.startswith(prefixes)}
