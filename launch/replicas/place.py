"""What a rank of a replica finds in its environment. Standard library only."""

import os
import sys
from collections.abc import Mapping


def rank_environment(rank: int, num_ranks: int, *, local_rank: int, address: str, port: int) -> dict[str, str]:
    """Where the ranks of a replica meet, and which of them this is; a rank that is alone needs none of it.

    Ranks of one machine talk over its loopback device: nothing listens where others could reach it.
    """
    if num_ranks == 1:
        return {}
    found = {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(local_rank)}
    found |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    if address == "127.0.0.1" and sys.platform.startswith("linux"):
        found |= {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return found


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what another launcher set for this process, or the ranks would join its rendezvous."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    prefixes = ("TORCHELASTIC_", "GROUP_", "ROLE_")
    return {name: value for name, value in environment.items() if name not in names and not name.startswith(prefixes)}
