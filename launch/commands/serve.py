"""serve.py: a model that stays loaded, behind OpenAI's video API."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from engine.batch.driver import Driver
from engine.batch.files import BatchFiles
from engine.batch.items import Batch, check_folder, claim_folder, plan_batch
from engine.batch.journal import FileJournal
from engine.batch.locks import own_shard
from engine.decode.preview import load_factors
from engine.decode.tiling import check_tiles
from engine.errors import UserError
from engine.files.checks import make_folder
from engine.files.storage import writing_to
from engine.load.checkpoint import open_checkpoint
from launch.arguments.serve import Arguments
from launch.batching.devices import arrange_variants, check_devices
from launch.batching.messages import SUPPORT, halted
from launch.batching.replicas import open_replicas
from launch.batching.runner import run_driver, worker_setup
from launch.process.exit_codes import LostRankError
from launch.serving.app import make_app
from launch.serving.dispatch import Listener, make_driver
from launch.serving.jobs import Jobs
from launch.serving.metrics import Metrics
from launch.serving.planner import SUITE, Planner
from launch.serving.rates import Rates
from launch.serving.requests import read_request

# Connections at once; more get status 503 before they are read. Leaves room for the process's other open files.
MOST_CONNECTIONS = 600


def run(given: Arguments) -> None:
    """Open the folder and its jobs, load the replicas, and serve until interrupted or halted."""
    options, (batch, jobs) = given.options, plan(given)
    root = options.out
    jobs.files.check()
    check_folder(root, batch)
    make_folder(root)
    with (
        listening(given.host, given.port) as sock,
        writing_to(root, after=SUPPORT),
        own_shard(root, options.shard),
    ):
        claim_folder(root, batch)
        jobs.open()
        for prompt in given.prompts:
            jobs.accept(read_request({"prompt": prompt}, jobs.planner.offer))
        driver = serve(given, batch, jobs, sock)
    if driver.halted is None:
        raise LostRankError(f"the HTTP server has ended; {SUPPORT}")
    raise halted(driver, jobs.files, jobs.planner.config, keep_latents=False)


def plan(given: Arguments) -> tuple[Batch, Jobs]:
    """Check the settings; returns the batch without items that describes them, and the jobs, of which none is read yet."""
    options = given.options
    if options.preview_factors is not None:
        load_factors(options.preview_factors)
    config, variants, _ = arrange_variants(given.config, given.variants, options)
    check_devices(config, options)
    checkpoint, video = open_checkpoint(config.model), config.video
    checkpoint.spec.check_video(video.num_frames, video.height, video.width)
    check_tiles(config.decode, checkpoint.spec)
    batch = plan_batch(variants, SUITE, seeds=(0,), checkpoint=checkpoint.digest, dtype=config.model.dtype)
    planner = Planner(config, {each.label: each for each in variants}, options, options.out / "pictures")
    return batch, Jobs(files=BatchFiles(root=options.out), planner=planner, most=given.most_jobs)


def serve(given: Arguments, batch: Batch, jobs: Jobs, sock: socket.socket) -> Driver:
    """Answer clients and make their jobs until the driver halts, and return it; Stopped if interrupted."""
    options, files, metrics = given.options, jobs.files, Metrics()
    journal = FileJournal(
        log=files.log(options.shard),
        status=files.status(options.shard),
        already=(jobs.counts()["completed"], jobs.counts()["failed"]),
        terminal=Listener(jobs=jobs, metrics=metrics),
    )
    setup = worker_setup(options, batch)
    with (
        open_replicas(options, files, count=options.replicas, setup=setup, wake=jobs.wake) as replicas,
        journal,
        contextlib.ExitStack() as stack,
    ):
        http: list[threading.Thread] = []
        driver = make_driver(jobs, replicas, journal, options, lambda: all(thread.is_alive() for thread in http))
        rates = Rates(given.requests_per_second, given.posts_per_minute)
        app = make_app(jobs, metrics, lambda: describe(driver, None if given.key else jobs), key=given.key, rates=rates)
        http.append(stack.enter_context(answering(app, sock)))
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port} serves {jobs.planner.offer.model} from {files.root}; Ctrl-C ends it", flush=True)
        journal.event("begin", host=socket.gethostname(), pid=os.getpid(), items=jobs.num_open, replicas=len(replicas))
        run_driver(driver, journal, files, left=lambda: f"{jobs.num_open} jobs are left")
    return driver


def describe(driver: Driver, jobs: Jobs | None) -> dict[str, Any]:
    """Content of `/health`: whether a replica has loaded the model, and the number of these jobs, if given."""
    states = [entry.state for entry in driver.entries]
    ready = any(state in ("idle", "busy") for state in states)
    counts = {} if jobs is None else {"jobs": dict(jobs.counts())}
    return {"status": "ok" if ready else "loading", "replicas": states, **counts}


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open the port before anything is loaded; UserError if it is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on --host {host} --port {port}: {error.strerror or error}; choose another --port"
        ) from error
    with sock:
        yield sock


@contextlib.contextmanager
def answering(app: ASGIApp, sock: socket.socket) -> Iterator[threading.Thread]:
    """Serve HTTP on a socket in a separate thread for the block."""
    settings = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]), name="http", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        server.should_exit = True
        thread.join(timeout=10)
