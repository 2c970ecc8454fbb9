"""Command line of serve.py."""

import importlib.util
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser

from engine.batch.variants import Variant
from engine.config import METHODS, RunConfig
from engine.errors import UserError
from engine.paths import expand
from launch.arguments.many_videos import OF_ONE_VIDEO, check_output, refuse_empty
from launch.arguments.options import add_methods, add_nproc, add_prompts_file
from launch.arguments.prompts import read_prompts
from launch.arguments.ranks import check_model
from launch.arguments.replicas import Replicas, add_replicas
from launch.arguments.variants import read_variants
from launch.cli.parser import add_former_name, parse_run
from launch.process.attention_backend import check_environment

DESCRIPTION = "Keep a model loaded, and make videos for clients of OpenAI's video API. A restart continues its jobs."
PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
LEAST_KEY = 16
MOST_RATE = 1e6


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The checked command line of serve.py.

    Attributes:
        config: the run; a request may change method, size, length and seed.
        variants: the methods that a request may select, the default one first.
        options: the replicas, and the folder of the jobs.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        key: API key of clients, or None.
        most_jobs: most jobs that wait or run.
        prompts: videos to make first.
        requests_per_second: limit of one client; 0 for none.
        posts_per_minute: limit of one client's requests that make or delete a video; 0 for none.
    """

    config: RunConfig
    variants: list[Variant]
    options: Replicas
    host: str
    port: int
    key: str | None
    most_jobs: int
    prompts: list[str]
    requests_per_second: float
    posts_per_minute: float


def read(argv: list[str]) -> Arguments:
    """Parse and check; UserError for a mistake."""
    namespace, config = parse_run(
        argv,
        name="serve.py",
        description=DESCRIPTION,
        add_arguments=add_arguments,
        unread=(*OF_ONE_VIDEO, "output.progress"),
    )
    check_environment()
    check_output(config.output, "serve.py")
    refuse_empty(namespace, "folder", "methods", "host", "api_key_file", "preview_factors", "prompts")
    if namespace.folder is None:
        raise UserError("--folder is missing; give a folder for jobs and videos")
    for name, least, most in (
        ("port", 0, 65535),
        ("most_jobs", 1, 10_000),
        ("snapshot_every", 0, 10_000),
        ("preview_every", 0, 10_000),
    ):
        if not least <= namespace[name] <= most:
            raise UserError(f"--{name} must lie in [{least}, {most}], got {namespace[name]}")
    for name in ("requests_per_second", "posts_per_minute"):
        if not 0 <= namespace[name] <= MOST_RATE:
            raise UserError(f"--{name} must lie in [0, {MOST_RATE:g}], 0 for no limit, got {namespace[name]}")
    key = None if namespace.api_key_file is None else read_key(expand(namespace.api_key_file))
    if key is None and not is_loopback(namespace.host):
        raise UserError(
            f"--host {namespace.host} accepts other machines, which requires --api_key_file FILE, a file with the clients' key"
        )
    namespace.out, namespace.shard = namespace.folder, None
    factors = None if namespace.preview_factors is None else expand(namespace.preview_factors).absolute()
    options = Replicas.of(
        namespace,
        config,
        snapshot_every=namespace.snapshot_every,
        sheets=True,
        preview_every=namespace.preview_every,
        preview_factors=factors,
    )
    variants = methods_of(config)
    if namespace.methods is not None:
        variants = read_variants(namespace.methods, argv, name="serve.py", add_arguments=add_arguments)
    check_model(config)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}; install with pip install 'freespec-engine[serve]'")
    prompts = [] if namespace.prompts is None else read_prompts(None, namespace.prompts).texts
    if len(prompts) > namespace.most_jobs:
        raise UserError(
            f"{namespace.prompts} has {len(prompts)} prompts, and --most_jobs is {namespace.most_jobs}; "
            f"give --most_jobs {len(prompts)} or fewer prompts"
        )
    return Arguments(
        config=config,
        variants=variants,
        options=options,
        host=namespace.host,
        port=namespace.port,
        key=key,
        most_jobs=namespace.most_jobs,
        prompts=prompts,
        requests_per_second=namespace.requests_per_second,
        posts_per_minute=namespace.posts_per_minute,
    )


def methods_of(config: RunConfig) -> list[Variant]:
    """Every method that the other settings allow, that of the configuration first."""
    found = [Variant.of(config, config.method.name)]
    for name in METHODS:
        try:
            variant = Variant.of(config, name)
        except UserError:
            continue
        if all(variant.acts_by != other.acts_by for other in found):
            found.append(variant)
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(path: Path) -> str:
    """Read the one key of a file; UserError for a short one, or one that a header cannot hold."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --api_key_file {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"--api_key_file {path} must hold one key of at least {LEAST_KEY} ASCII characters without spaces, got {len(key)}"
        )
    return key


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command, beside the settings of a run."""
    for name, kind, default, text in (
        ("folder", str, None, "folder of the jobs and their videos; may hold those of an earlier start"),
        ("host", str, "127.0.0.1", "address to listen on; one that other machines reach needs --api_key_file"),
        ("port", int, 8000, "port to listen on; 0 takes a free one"),
        ("api_key_file", str, None, "file with one key, which clients send as their API key"),
        ("most_jobs", int, 64, "most jobs that wait or run; more get status 429"),
        ("requests_per_second", float, 500.0, "requests of one client (an address, and its key); 0 for no limit"),
        ("posts_per_minute", float, 120.0, "requests of one client that make or delete a video; 0 for no limit"),
        (
            "snapshot_every",
            int,
            5,
            "steps between snapshots of a video; 0 writes one when stopped, and before decoding",
        ),
        ("preview_every", int, 4, "steps between previews of a running video; 0 disables them"),
        ("preview_factors", str, None, "file of previews.py (default: that of configs/previews for this VAE)"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    add_methods(parser, "; what a request may name (default: all that the settings allow)")
    add_prompts_file(parser, ": videos to make first")
    add_nproc(parser)
    add_replicas(parser)
    add_former_name(parser, "checkpoint_every", "snapshot_every", int)
