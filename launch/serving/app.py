"""HTTP: OpenAI's video API over the jobs of a folder, their progress as events, metrics, and a page."""

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import AsyncIterator, Callable, Mapping
from importlib.resources import files as resources
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from engine.errors import UserError
from engine.media.read_video import read_video
from launch.serving.extra import names_of
from launch.serving.guard import Guard, as_response
from launch.serving.jobs import Job, Jobs
from launch.serving.metrics import Metrics
from launch.serving.planner import name_picture
from launch.serving.rates import Rates
from launch.serving.requests import MOST_TEXT, RefusedError, read_request

Variant = Literal["video", "thumbnail", "spritesheet", "preview"]
# Seconds between two looks at a job whose progress a client follows, and between signs of life.
_LOOK, _ALIVE = 0.2, 15.0
_ENDED = ("completed", "failed")
# Only the page's own style and script, by their hashes, so that injected HTML cannot run.
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src blob: data:; media-src blob:; style-src {style}; script-src {script}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(
    jobs: Jobs, metrics: Metrics, health: Callable[[], Mapping[str, Any]], *, key: str | None, rates: Rates
) -> Guard:
    """Make the application; `health` describes the replicas."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = resources("launch.serving").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _POLICY.format(**{name: _hash_of(page, name) for name in ("style", "script")})
    }
    _add_errors(app)
    _add_videos(app, jobs)
    _add_contents(app, jobs)

    @app.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    @app.get("/health")
    async def show_health() -> JSONResponse:
        return JSONResponse(dict(health()))

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(jobs.counts()), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(jobs)]})

    @app.get("/v1/models/{name}")
    async def show_model(name: str) -> JSONResponse:
        if name != jobs.planner.offer.model:
            raise RefusedError(f"there is no model {name[:60]!r}", status=404, code="model_not_found", param="model")
        return JSONResponse(_model(jobs))

    return Guard(app, key, rates)


def _hash_of(page: str, name: str) -> str:
    """The CSP source of the page's one element of this name."""
    text = page.partition(f"<{name}>")[2].partition(f"</{name}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _model(jobs: Jobs) -> dict[str, Any]:
    offer = jobs.planner.offer
    known = {"id": offer.model, "object": "model", "created": 0, "owned_by": "freespec"}
    size, seconds = f"{offer.width}x{offer.height}", offer.seconds(offer.num_frames)
    return (
        known
        | {
            "methods": list(offer.methods),
            "size": size,
            "seconds": seconds,
            "seed": offer.seed,
            "step": offer.step / offer.fps,
        }
        | {"extra": {label: names_of(variant.config) for label, variant in jobs.planner.variants.items()}}
    )


def _add_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's format; a mistake in a request is never a server error."""

    @app.exception_handler(UserError)
    async def answer_mistake(_: Request, error: UserError) -> JSONResponse:
        return as_response(error if isinstance(error, RefusedError) else RefusedError(str(error)))

    @app.exception_handler(HTTPException)
    async def answer_http(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return as_response(RefusedError(str(error.detail), status=error.status_code, code=code))

    @app.exception_handler(RequestValidationError)
    async def answer_wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return as_response(RefusedError(f"{name}: {first['msg']}", param=name))

    @app.exception_handler(Exception)
    async def answer_fault(_: Request, __: Exception) -> JSONResponse:
        return as_response(RefusedError("the server failed; its log has the cause", status=500, code="server_error"))


def _add_videos(app: FastAPI, jobs: Jobs) -> None:
    @app.post("/v1/videos")
    async def create(request: Request) -> JSONResponse:
        fields, picture = await _read_body(request)
        return JSONResponse(await run_in_threadpool(_accept, jobs, fields, picture))

    @app.get("/v1/videos")
    def list_videos(limit: int = 20, order: Literal["asc", "desc"] = "desc", after: str | None = None) -> JSONResponse:
        if not 1 <= limit <= 100:
            raise RefusedError(f"limit must lie in [1, 100], got {limit}", param="limit")
        found, more = jobs.page(limit=limit, newest_first=order == "desc", after=after)
        ends = {"first_id": found[0]["id"] if found else None, "last_id": found[-1]["id"] if found else None}
        return JSONResponse({"object": "list", "data": found, "has_more": more, **ends})

    @app.get("/v1/videos/{video_id}")
    async def show(video_id: str) -> JSONResponse:
        return JSONResponse(jobs.shown(jobs.find(video_id)))

    @app.delete("/v1/videos/{video_id}")
    def delete(video_id: str) -> JSONResponse:
        jobs.delete(video_id)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    @app.get("/v1/videos/{video_id}/events")
    async def follow(video_id: str) -> StreamingResponse:
        jobs.find(video_id)
        return StreamingResponse(_events(jobs, video_id), media_type="text/event-stream")


def _add_contents(app: FastAPI, jobs: Jobs) -> None:
    @app.get("/v1/videos/{video_id}/content")
    def content(video_id: str, variant: Variant = "video") -> Response:
        job = jobs.find(video_id)
        if variant == "preview":
            return _preview(jobs, job)
        if job.status != "completed":
            raise RefusedError(f"the video is {job.status}, not completed", status=409, code="not_ready")
        files = jobs.files.of(job.planned.item)
        if variant == "video":
            return FileResponse(files.video, media_type="video/mp4", filename=f"{video_id}.mp4")
        if variant == "spritesheet":
            return FileResponse(files.sheet, media_type="image/png")
        picture = io.BytesIO()
        Image.fromarray(next(read_video(files.video))).save(picture, "WEBP", quality=90)
        return Response(picture.getvalue(), media_type="image/webp")


def _preview(jobs: Jobs, job: Job) -> Response:
    """The preview of a running job, read completely, since the next one replaces the file."""
    try:
        data = jobs.files.of(job.planned.item).preview.read_bytes()
    except FileNotFoundError as error:
        raise RefusedError(f"the video is {job.status} and has no preview", status=404, code="not_found") from error
    return Response(data, media_type="image/webp")


async def _events(jobs: Jobs, name: str) -> AsyncIterator[str]:
    """Stream a job at each change as server-sent events, until it has ended or is deleted."""
    before, silent = "", 0.0
    while True:
        try:
            shown = jobs.shown(jobs.find(name))
        except RefusedError:
            yield f"event: deleted\ndata: {json.dumps({'id': name})}\n\n"
            return
        now = json.dumps(shown)
        if now != before:
            yield f"event: video\ndata: {now}\n\n"
            before, silent = now, 0.0
        elif silent >= _ALIVE:
            yield ": alive\n\n"
            silent = 0.0
        if shown["status"] in _ENDED:
            return
        await asyncio.sleep(_LOOK)
        silent += _LOOK


async def _read_body(request: Request) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a request, JSON or a form, and the picture in `input_reference`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _read_form(request)
    if kind != "application/json":
        raise RefusedError("send multipart/form-data or application/json", status=415, code="unsupported_media_type")
    body = await request.body()
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError("the body is not JSON") from error
    if not isinstance(fields, dict):
        raise RefusedError("the body must be a JSON object")
    if fields.get("input_reference") is not None:
        raise RefusedError("send input_reference as a file of a form", param="input_reference")
    return fields, None


async def _read_form(request: Request) -> tuple[dict[str, Any], bytes | None]:
    try:
        async with request.form(max_files=1, max_fields=40, max_part_size=8 * MOST_TEXT) as form:
            return await _read_fields(form)
    except (UserError, HTTPException):
        raise
    except (ValueError, KeyError) as error:
        raise RefusedError("the form cannot be read") from error


async def _read_fields(form: FormData) -> tuple[dict[str, Any], bytes | None]:
    fields: dict[str, Any] = {}
    picture = None
    for name, value in form.multi_items():
        is_file = isinstance(value, UploadFile)
        if name in fields or is_file != (name == "input_reference"):
            what = "is there twice" if name in fields else f"must be a {'text' if is_file else 'file'}"
            raise RefusedError(f"{name[:60]} {what}", param=name[:60])
        fields[name] = value
        picture = await value.read() if isinstance(value, UploadFile) else picture
    return fields, picture


def _accept(jobs: Jobs, fields: Mapping[str, Any], picture: bytes | None) -> dict[str, Any]:
    name = None if picture is None else name_picture(picture)
    return jobs.accept(read_request(fields, jobs.planner.offer, picture=name), picture)
