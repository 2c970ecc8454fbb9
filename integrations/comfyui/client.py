"""Requests to serve.py, by the standard library alone."""

import http.client
import json
import os
import secrets
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ADDRESS = "http://127.0.0.1:8000"
# The operator of ComfyUI may name a service and its key, which then is not saved with workflows.
ADDRESS_VARIABLE, KEY_VARIABLE = "FREESPEC_ADDRESS", "FREESPEC_API_KEY"
TIMEOUT_SECONDS = 60.0


class ServiceError(RuntimeError):
    """What the service refused or failed at, in one line."""


class AwayError(ServiceError):
    """The service does not answer now; it may be starting again. `wait` are the seconds that it asks for, if any."""

    def __init__(self, message: str, wait: float = 1.0) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Service:
    """A service: scheme, host and port, and the key that it wants, or an empty text."""

    scheme: str
    host: str
    path: str
    key: str

    @classmethod
    def of(cls, address: str, key: str) -> "Service":
        """Read an address; one that is empty, and its key, come from the environment.

        A workflow of somebody else may name any address: the key of the environment goes to the address of the environment alone.
        """
        known = os.environ.get(ADDRESS_VARIABLE, "").strip() or ADDRESS
        address = (address.strip() or known).rstrip("/")
        if not key.strip() and address == known.rstrip("/"):
            key = os.environ.get(KEY_VARIABLE, "")
        try:
            parts = urllib.parse.urlsplit(address)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.username
        except ValueError:
            valid = False
        if not valid or parts.query or parts.fragment or not address.isascii() or not address.isprintable():
            raise ServiceError(f"the address must look like {ADDRESS}, got {address!r:.80}")
        key = key.strip()
        if not key.isascii() or not key.isprintable():
            raise ServiceError("the API key has characters that a header cannot hold")
        return cls(parts.scheme, parts.netloc, parts.path, key)

    def create(self, fields: Mapping[str, str], picture: bytes | None = None) -> dict[str, Any]:
        """Ask for a video; `picture` is the first frame, as PNG."""
        boundary = secrets.token_hex(16)
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
            for name, value in fields.items()
        ]
        if picture is not None:
            head = 'Content-Disposition: form-data; name="input_reference"; filename="first.png"\r\nContent-Type: image/png'
            parts.append(f"--{boundary}\r\n{head}\r\n\r\n".encode() + picture + b"\r\n")
        body = b"".join(parts) + f"--{boundary}--\r\n".encode()
        data = self._ask("POST", "/v1/videos", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        return _job(data)

    def show(self, name: str) -> dict[str, Any]:
        """The state of a job."""
        return _job(self._ask("GET", f"/v1/videos/{name}"))

    def content(self, name: str) -> bytes:
        """The finished video, an mp4."""
        return self._ask("GET", f"/v1/videos/{name}/content")

    def delete(self, name: str) -> None:
        """Cancel a job."""
        self._ask("DELETE", f"/v1/videos/{name}")

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        sent = {**(headers or {}), **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        where = f"{self.scheme}://{self.host}{self.path}"
        connection = kind(self.host, timeout=TIMEOUT_SECONDS)
        try:
            connection.request(method, self.path + path, body, sent)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise AwayError(
                f"the FreeSpec service at {where} does not answer: {error or type(error).__name__}"
            ) from error
        finally:
            connection.close()
        if answer.status == 200:
            return data
        message = f"the FreeSpec service at {where}: {_message(data) or f'it answered {answer.status}'}"
        if answer.status in (429, 502, 503, 504):
            wait = answer.headers.get("Retry-After", "1")
            raise AwayError(message, float(wait) if wait.isdigit() else 1.0)
        raise ServiceError(message)


def _job(data: bytes) -> dict[str, Any]:
    try:
        job = json.loads(data)
        known = {"id": str(job["id"]), "status": str(job["status"]), "progress": int(job["progress"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError("the address answers, but not as a FreeSpec service does") from error
    if not known["id"].replace("_", "").isalnum():
        raise ServiceError("the service names its job in an unknown way")
    return known | {"message": (job.get("error") or {}).get("message")}


def _message(data: bytes) -> str:
    """The line of an error in OpenAI's shape, or nothing."""
    try:
        return " ".join(str(json.loads(data)["error"]["message"]).split())[:500]
    except (ValueError, KeyError, TypeError):
        return ""
