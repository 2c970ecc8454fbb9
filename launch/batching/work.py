"""What a batch's driver is given: the items of its shard by what is known of them, and the task of each attempt."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.batch.files import identity_of
from engine.batch.items import Item


@dataclass(frozen=True, kw_only=True)
class Work:
    """What of a shard is done already, was given up before, and is to be made."""

    done: tuple[Item, ...]
    given_up: tuple[Item, ...]
    todo: tuple[Item, ...]


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Makes the task of an attempt: what a worker must know of an item beside its configuration."""

    suite: Mapping[str, Any]

    def __call__(self, item: Item, attempt: int, replica: str) -> dict[str, Any]:
        """See `launch.batching.worker`; the token names this attempt's unfinished file, for ever."""
        return {
            "identity": identity_of(item),
            "name": item.name,
            "suite": self.suite,
            "attempt": attempt,
            "replica": replica,
            "token": secrets.token_hex(4),
        }
