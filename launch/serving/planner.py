"""Convert a request to a batch item: its configuration, the checks of generate.py, and its id."""

import dataclasses
import hashlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from engine.batch.forecast import arrange_replica
from engine.batch.identity import text_sha256
from engine.batch.items import Item, plan_batch
from engine.batch.suite import Prompt, Suite
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.errors import UserError
from engine.given.frames import GivenFrames, GivenImage
from engine.given.known import check_given
from engine.load.checkpoint import Checkpoint
from engine.load.pipeline import load_tokenizer
from engine.text.prompts import PROMPT, check_read_prompts
from launch.arguments.replicas import Replicas
from launch.serving.extra import with_extra
from launch.serving.requests import Offer, RefusedError, VideoRequest

SUITE = Suite(name="serve", sha256=text_sha256(""), prompts=())
PICTURES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
MOST_PIXELS = 32_000_000


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A request as an item, with the extra content of its task."""

    request: VideoRequest
    item: Item
    config: RunConfig
    given: GivenFrames | None
    given_settings: Mapping[str, Any] | None

    @property
    def task(self) -> dict[str, Any]:
        """The task's content beside the item's identity, in JSON types."""
        return {
            "config": dataclasses.asdict(self.config),
            "given": None if self.given is None else self.given.arguments,
            "given_settings": self.given_settings,
        }


@dataclass(frozen=True)
class Planner:
    """Plans the requests of one service.

    Attributes:
        config: the run, with device, dtype and degrees set.
        variants: the available methods, by label.
        options: the replicas.
        pictures: folder of the pictures that clients have sent.
    """

    config: RunConfig
    variants: Mapping[str, Variant]
    options: Replicas
    pictures: Path

    @cached_property
    def _loaded(self) -> tuple[Checkpoint, Any]:
        return load_tokenizer(self.config.model)

    @cached_property
    def offer(self) -> Offer:
        """The options of a request, and their defaults."""
        checkpoint, video = self._loaded[0], self.config.video
        return Offer(
            model=Path(self.config.model.path).name,
            methods=tuple(self.variants),
            height=video.height,
            width=video.width,
            num_frames=video.num_frames,
            fps=video.fps,
            step=checkpoint.spec.temporal_factor,
            seed=self.config.sampler.seed,
        )

    def plan(self, request: VideoRequest) -> Planned:
        """Check a request as generate.py checks its command line; UserError if it cannot be made."""
        (checkpoint, tokenizer), options = self._loaded, self.options
        self._check_size(request)
        size = {"num_frames": request.num_frames, "height": request.height, "width": request.width}
        checkpoint.spec.check_video(*size.values())
        config = self.variants[request.method].config
        config = with_extra(dataclasses.replace(config, video=dataclasses.replace(config.video, **size)), request.extra)
        variant = Variant(label=request.method, config=config)
        given, settings = self._given(request), None
        device = torch.device(config.model.device)
        arrange_replica([variant], options.ranks, device, gpu=None, nodes=options.nodes, given=given)
        check_read_prompts(checkpoint, tokenizer, config.sampler, config.video, [(PROMPT, request.prompt)])
        if given is None:
            check_given(None, checkpoint.spec, **size, fps=config.video.fps)
        else:
            try:
                check_given(given, checkpoint.spec, **size, fps=config.video.fps)
            except UserError as error:  # which names the file as the operator knows it
                line = str(error).replace(str(given.images[0].path), "input_reference")
                raise RefusedError(line, param="input_reference") from error
            spec = checkpoint.spec
            settings = given.settings(
                num_frames=request.num_frames, fps=config.video.fps, step=spec.temporal_factor, pictures=spec.pictures
            )
        prompt = Prompt(prompt_id=f"p{text_sha256(request.prompt)[:12]}", line=1, text=request.prompt)
        batch = plan_batch(
            [variant],
            dataclasses.replace(SUITE, prompts=(prompt,)),
            seeds=(request.seed,),
            checkpoint=checkpoint.digest,
            dtype=config.model.dtype,
            given=settings,
        )
        return Planned(request=request, item=batch.items[0], config=config, given=given, given_settings=settings)

    def _given(self, request: VideoRequest) -> GivenFrames | None:
        if request.picture is None:
            return None
        return GivenFrames(images=(GivenImage(where="first", path=self.pictures / request.picture),))

    def _check_size(self, request: VideoRequest) -> None:
        """Raise RefusedError for a video with more pixels than the preset's, which is known to fit the memory."""
        video = self.config.video
        most = video.num_frames * video.height * video.width
        asked = request.num_frames * request.height * request.width
        if asked > most:
            raise RefusedError(
                f"{request.num_frames} frames of {request.width}x{request.height} are {asked} pixels, and this service makes at most "
                f"{most}, as {self.offer.seconds(video.num_frames)} seconds of {video.width}x{video.height}; ask for less",
                param="size",
            )


def name_picture(data: bytes) -> str:
    """Decode a client's picture and name its file by content; RefusedError for anything else or for a huge one."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=tuple(PICTURES)) as image:
            warnings.simplefilter("error")
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise RefusedError(
                    f"input_reference has {width} x {height} pixels, and at most {MOST_PIXELS} are read; send a smaller one",
                    param="input_reference",
                )
            kind = PICTURES[str(image.format)]
            image.load()
    except RefusedError:
        raise
    except (OSError, SyntaxError, ValueError, ArithmeticError, Warning, Image.DecompressionBombError) as error:
        raise RefusedError(
            f"input_reference is not a whole picture in {', '.join(PICTURES)}; send one", param="input_reference"
        ) from error
    return f"{hashlib.sha256(data).hexdigest()}.{kind}"
