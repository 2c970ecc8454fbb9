"""Open the replicas of a batch: local processes, or actors of a Ray cluster."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.batch.files import BatchFiles
from engine.errors import UserError
from launch.arguments.replicas import Replicas
from launch.batching.group import Group
from launch.process.environment import carried, share_cores
from launch.ranks.host import end_ranks
from launch.ranks.local import WORKER, LocalRanks
from launch.ranks.ray_pool import NoRayError, RayPool, RayRanks, Start


@contextlib.contextmanager
def open_replicas(
    options: Replicas, files: BatchFiles, *, count: int, setup: Mapping[str, Any], wake: threading.Event
) -> Iterator[list[Group]]:
    """Open the replicas for the block: local processes, or actors of a Ray cluster. At its end their ranks have ended."""
    names = [f"replica-{index}" for index in range(count)]
    logs = files.log(options.shard).with_suffix("")
    with contextlib.suppress(OSError):  # a rank whose log cannot be opened says so
        logs.mkdir(parents=True, exist_ok=True)
    if options.ray is None:
        local = [_local(options, files, index, name, wake) for index, name in enumerate(names)]
        try:
            yield [Group(name=name, ranks=ranks, setup=setup) for name, ranks in zip(names, local, strict=True)]
        finally:
            end_ranks(local)
        return
    try:
        with RayPool(options.ray, cpus=count * options.ranks, log=logs / "ray.log", wake=wake.set) as pool:
            check_cluster(options, pool.gpus, most=pool.most_gpus)
            yield [Group(name=name, ranks=_on_ray(pool, options, files, name), setup=setup) for name in names]
    except NoRayError as error:
        raise UserError(str(error)) from error


def check_cluster(options: Replicas, gpus: float, *, most: float | None = None) -> None:
    """Raise UserError for a batch that would use only the CPUs of a cluster with GPUs, unless model.device is cpu.

    `gpus` are available now; `most` is the most that the cluster's autoscaler may add up to.
    """
    if (gpus or most) and not options.gpus and not options.on_cpu:
        has = f"has {gpus:g} GPUs" if gpus else "may bring GPUs"
        raise UserError(
            f"the Ray cluster at {options.ray} {has}, and this batch would run on CPUs; give "
            "--gpus_per_replica N to use them, or --model.device cpu if that is what you want"
        )


def _on_ray(pool: RayPool, options: Replicas, files: BatchFiles, name: str) -> RayRanks:
    start = Start(
        gpus=options.gpus,
        strategy=options.strategy,
        command=WORKER,
        environment=carried(os.environ),
        logs=[str(files.rank_log(options.shard, name, rank)) for rank in range(options.ranks)],
        cwd=str(Path.cwd()),
    )
    return pool.ranks(name, options.ranks, start)


def _local(options: Replicas, files: BatchFiles, index: int, name: str, wake: threading.Event) -> LocalRanks:
    environment = share_cores(options.ranks * options.replicas)
    if torch.cuda.is_available():
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        every = given.split(",") if given else [str(device) for device in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(every[index * options.ranks : (index + 1) * options.ranks])
    return LocalRanks(
        options.ranks,
        log=lambda rank: files.rank_log(options.shard, name, rank),
        environment=environment,
        wake=wake.set,
    )
