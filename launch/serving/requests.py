"""Parse and check the fields of `POST /v1/videos`, OpenAI's and ours, without files or a model."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import UserError
from engine.text.timeline import SYNTAX, parse_timeline

MOST_TEXT = 8000
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_SECONDS = re.compile(r"\d{1,6}(?:\.\d{1,6})?")
_SEED = re.compile(r"\d{1,19}")
_NUMBER = re.compile(r"-?\d{1,20}(?:\.\d{1,20})?(?:e[+-]?\d{1,3})?")
# A setting of `extra` in a form, as OpenAI's client writes it.
_EXTRA = re.compile(r"extra\[([^\[\]]{1,100})\]")
_FIELDS = ("prompt", "timeline", "model", "size", "seconds", "seed", "method", "extra", "input_reference")
# Other fields that OpenAI's clients may send, which change nothing here.
_IGNORED = ("user", "metadata")


class RefusedError(UserError):
    """A refused request, with its HTTP status and the fields that OpenAI's clients read beside the message."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        wait: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.wait = status, code, param, wait


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The models, methods and sizes that a service offers.

    Attributes:
        model: name of the model.
        methods: labels of the methods, the default one first.
        height: default height of a video.
        width: default width.
        num_frames: default number of frames.
        fps: frames per second of every video.
        step: frames of the video in a latent frame.
        seed: default seed.
    """

    model: str
    methods: Collection[str]
    height: int
    width: int
    num_frames: int
    fps: int
    step: int
    seed: int

    def seconds(self, num_frames: int) -> str:
        """The length of a video as clients write it."""
        return f"{(num_frames - 1) / self.fps:.10g}"


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """One requested video.

    Attributes:
        prompt: the text, or the timeline in its canonical form.
        method: label of the method.
        height: pixels.
        width: pixels.
        num_frames: frames of the video.
        seed: of the noise.
        picture: name of the stored file of the first frame; or None.
        extra: other settings by name, as the client wrote them; see `launch.serving.extra`.
    """

    prompt: str
    method: str
    height: int
    width: int
    num_frames: int
    seed: int
    picture: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


def read_request(fields: Mapping[str, Any], offer: Offer, picture: str | None = None) -> VideoRequest:
    """Check the fields of a request, texts or JSON values, with the name of its picture; RefusedError for a wrong one.

    The settings in `extra` are checked when the request is planned, with the configuration that they change.
    """
    fields, extra = _split_extra(fields)
    unknown = sorted(str(name) for name in fields.keys() - {*_FIELDS, *_IGNORED})
    if unknown:
        raise RefusedError(f"unknown field {unknown[0]!r:.60}; known are {', '.join(_FIELDS)}", param=unknown[0][:60])
    given = {name: value for name, value in fields.items() if value is not None and name != "input_reference"}
    if given.get("model", offer.model) != offer.model:
        raise RefusedError(
            f"the model {given['model']!r:.60} is not served here; this is {offer.model}",
            status=404,
            code="model_not_found",
            param="model",
        )
    method = given.get("method", next(iter(offer.methods)))
    if not isinstance(method, str) or method not in offer.methods:
        raise RefusedError(f"unknown method {method!r:.60}; choose one of {', '.join(offer.methods)}", param="method")
    width, height = (offer.width, offer.height) if "size" not in given else _size(given["size"])
    return VideoRequest(
        prompt=_prompt(given),
        method=method,
        height=height,
        width=width,
        num_frames=offer.num_frames if "seconds" not in given else _frames(given["seconds"], offer),
        seed=offer.seed if "seed" not in given else _seed(given["seed"]),
        picture=picture,
        extra=extra,
    )


def _split_extra(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The other fields, and the settings of `extra`: an object, its JSON as a text, or a form's fields `extra[NAME]`."""
    single = {found[1]: fields[name] for name in fields if (found := _EXTRA.fullmatch(name))}
    rest = {name: value for name, value in fields.items() if name != "extra" and not _EXTRA.fullmatch(name)}
    given = fields.get("extra")
    try:
        whole = json.loads(given) if isinstance(given, str) else {} if given is None else given
    except (ValueError, RecursionError):
        whole = None
    if not isinstance(whole, dict):
        raise RefusedError(f"extra must be an object of settings by name, got {given!r:.60}", param="extra")
    if twice := single.keys() & whole.keys():
        raise RefusedError(f"extra has {min(twice)!r:.60} twice", param="extra")
    return rest, whole | single


def _prompt(given: Mapping[str, Any]) -> str:
    """The prompt, or the timeline in its canonical form, as generate.py has it."""
    timeline, prompt = given.get("timeline"), given.get("prompt")
    if (timeline in (None, "")) == (prompt in (None, "")):
        raise RefusedError("give one of prompt and timeline", param="prompt")
    name, value = ("prompt", prompt) if timeline in (None, "") else ("timeline", timeline)
    if not isinstance(value, str) or not value.strip():
        raise RefusedError(f"{name} must be a text with words, got {value!r:.60}", param=name)
    if len(value) > MOST_TEXT:
        raise RefusedError(
            f"{name} has {len(value)} characters, and at most {MOST_TEXT} are read; shorten it", param=name
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(f"{name} is not valid Unicode", param=name) from error
    if name == "prompt":
        return value
    read = parse_timeline(value)
    if read is None:
        raise RefusedError(f"the timeline {value!r:.60} has no range; {SYNTAX}", param=name)
    return str(read)


def _match(pattern: re.Pattern[str], value: Any, name: str, example: str) -> re.Match[str]:
    is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
    found = pattern.fullmatch(str(value)) if is_text else None
    if found is None or not found[0].isascii():
        raise RefusedError(f"{name} must look like {example}, got {value!r:.60}", param=name)
    return found


def read_number(value: Any, name: str, example: str) -> str:
    """The digits of a number, which may be a text; RefusedError for anything else."""
    return _match(_NUMBER, value, name, example)[0]


def _size(value: Any) -> tuple[int, int]:
    found = _match(_SIZE, value, "size", "832x480, the width and the height")
    return int(found[1]), int(found[2])


def _frames(value: Any, offer: Offer) -> int:
    """The frames of a video of so many seconds: the nearest length that the model makes."""
    seconds = float(_match(_SECONDS, value, "seconds", "8 or 4.5")[0])
    return max(round(seconds * offer.fps / offer.step), 0) * offer.step + 1


def _seed(value: Any) -> int:
    seed = int(_match(_SEED, value, "seed", "7")[0])
    if seed >= 2**63:
        raise RefusedError(f"seed must be less than 2**63, got {seed}", param="seed")
    return seed
