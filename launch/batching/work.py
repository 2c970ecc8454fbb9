"""Input of a batch's driver: the items of its shard by state, and the task of each attempt."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.batch.files import identity_of
from engine.batch.items import Item


@dataclass(frozen=True, kw_only=True)
class Work:
    """Items of a shard that are done, were given up, or are to be made."""

    done: tuple[Item, ...]
    given_up: tuple[Item, ...]
    todo: tuple[Item, ...]


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make the task of an attempt: what a worker needs beside the item's configuration."""

    suite: Mapping[str, Any]

    def __call__(self, item: Item, attempt: int, replica: str) -> dict[str, Any]:
        """See `launch.batching.worker`; the token is unique and names this attempt's unfinished file."""
        return {
            "identity": identity_of(item),
            "name": item.name,
            "suite": self.suite,
            "attempt": attempt,
            "replica": replica,
            "token": secrets.token_hex(4),
        }
