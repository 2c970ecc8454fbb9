"""Rate limits: a token bucket for each client."""

import contextlib
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from launch.serving.requests import RefusedError

# Most clients kept; the least recently active is dropped first.
MOST_CLIENTS = 4096
# Bodies of up to 16 MiB that are read at a time.
MOST_BODIES = 32
BURST_SECONDS = {"request": 2.0, "post": 60.0}


@dataclass
class Rates:
    """Limits of one service.

    Attributes:
        requests_per_second: of one client; 0 for no limit.
        posts_per_minute: requests of one client that make or delete a video; 0 for no limit.
        clock: time in seconds.
    """

    requests_per_second: float
    posts_per_minute: float
    clock: Callable[[], float] = time.monotonic
    _buckets: OrderedDict[tuple[str, str], tuple[float, float]] = field(default_factory=OrderedDict)
    _bodies: int = 0

    def check(self, client: str, *, is_post: bool) -> None:
        """Count a request; RefusedError with status 429 if its client has asked too often."""
        self._take(client, "request", self.requests_per_second, f"{self.requests_per_second:g} requests a second")
        if is_post:
            self._take(client, "post", self.posts_per_minute / 60, f"{self.posts_per_minute:g} changes a minute")

    def _take(self, client: str, kind: str, rate: float, what: str) -> None:
        if rate == 0:
            return
        most, now = max(rate * BURST_SECONDS[kind], 1.0), self.clock()
        level, then = self._buckets.pop((kind, client), (most, now))
        level = min(most, level + (now - then) * rate)
        self._buckets[kind, client] = (level - 1 if level >= 1 else level, now)
        while len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        if level < 1:
            wait = math.ceil((1 - level) / rate)
            raise _too_often(f"more than {what}; ask again in {wait} s", wait)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count a body that is read, for the block; RefusedError if too many are."""
        if self._bodies >= MOST_BODIES:
            raise _too_often(f"{MOST_BODIES} other requests are being read; ask again in 1 s", 1)
        self._bodies += 1
        try:
            yield
        finally:
            self._bodies -= 1


def _too_often(message: str, wait: int) -> RefusedError:
    return RefusedError(message, status=429, code="rate_limit_exceeded", wait=wait)


def client_of(host: str | None, *, has_key: bool) -> str:
    """The client of a rate limit: an address, or an IPv6 /64, with a key or without.

    The address is that of the connection: any client can write a header such as X-Forwarded-For.
    """
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return f"{has_key} {host}"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return f"{has_key} {int(address) >> 64:x}"
        address = address.ipv4_mapped
    return f"{has_key} {address}"
