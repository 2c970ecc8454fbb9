"""Checks before a request is read: body size, origin, API key and rate."""

import asyncio
import contextlib
import hmac
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.shown import printable
from launch.arguments.serve import is_loopback
from launch.serving.rates import Rates, client_of
from launch.serving.requests import RefusedError

MOST_BODY = 16 << 20
# Seconds that the next piece of a body may take.
SILENT_LONGEST = 30.0
# Paths without a key, since they reveal no jobs: the page, which asks for the key itself, and the health check.
OPEN_PATHS = ("/", "/health")
_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


def as_response(error: RefusedError) -> JSONResponse:
    """The answer to a refused request, in the shape of OpenAI's errors."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    line, param = (None if each is None else printable(each) for each in (" ".join(str(error).split()), error.param))
    headers = _SAFE | ({} if error.wait is None else {"Retry-After": str(error.wait)})
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = {"error": {"message": line, "type": kind, "param": param, "code": error.code}}
    return JSONResponse(body, status_code=error.status, headers=headers)


@dataclass(frozen=True)
class Guard:
    """Middleware that refuses a request before the application sees it.

    Attributes:
        app: the application.
        key: the key for `Authorization: Bearer KEY`; None accepts requests to the loopback device by its name.
        rates: rate limits.
    """

    app: ASGIApp
    key: str | None
    rates: Rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] != "http":
            return
        is_post = scope["method"] not in ("GET", "HEAD")

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                extra = [(name.lower().encode(), value.encode()) for name, value in _SAFE.items()]
                message["headers"] = [*message["headers"], *(each for each in extra if each[0] not in present)]
            await send(message)

        try:
            self._check(scope, is_post=is_post)
            with self.rates.reading() if is_post else contextlib.nullcontext():
                await self.app(scope, _bounded(receive) if is_post else receive, send_safely)
        except RefusedError as refused:
            await as_response(refused)(scope, receive, send)

    def _check(self, scope: Scope, *, is_post: bool) -> None:
        """Raise RefusedError for a request that the application must not see."""
        headers = Headers(scope=scope)
        self._check_source(headers)
        has_key = self.key is not None and self._has_key(headers)
        host = None if scope["client"] is None else scope["client"][0]
        self.rates.check(client_of(host, has_key=has_key), is_post=is_post)
        if self.key is not None and scope["path"] not in OPEN_PATHS and not has_key:
            raise RefusedError("the API key is missing or wrong", status=401, code="invalid_api_key")

    def _check_source(self, headers: Headers) -> None:
        """Raise RefusedError for a body that is too large, and for a page of another site, before its request is counted."""
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 20) or int(length) > MOST_BODY:
            raise too_large()
        host = headers.get("host", "")
        # A page of another site may send requests to this machine, or resolve its own name to this machine's address.
        if self.key is None and not is_loopback(_split(f"//{host}").hostname or ""):
            raise RefusedError(
                f"the host {host[:60]!r} is not this machine's loopback; use 127.0.0.1", status=403, code="forbidden"
            )
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            raise RefusedError(f"requests of pages from {origin[:60]!r} are refused", status=403, code="forbidden")

    def _has_key(self, headers: Headers) -> bool:
        assert self.key is not None
        kind, _, given = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode())


def _split(address: str) -> SplitResult:
    """Split an address; the parts are empty if it is not valid."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def too_large() -> RefusedError:
    """The refusal of a body above `MOST_BODY`."""
    return RefusedError(f"the request is larger than {MOST_BODY >> 20} MiB", status=413, code="too_large")


def _bounded(receive: Receive) -> Receive:
    """Receive at most `MOST_BODY`, for bodies without a length, and give up on a silent client."""
    seen, whole = 0, False

    async def take() -> Message:
        nonlocal seen, whole
        try:
            async with asyncio.timeout(None if whole else SILENT_LONGEST):
                message = await receive()
        except TimeoutError as error:
            raise RefusedError("the body of the request did not arrive", status=408, code="timeout") from error
        whole = not message.get("more_body", False)
        seen += len(message.get("body", b""))
        if seen > MOST_BODY:
            raise too_large()
        return message

    return take
