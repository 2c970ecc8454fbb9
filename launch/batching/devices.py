"""Resolve and check the devices of a batch."""

import dataclasses
from collections.abc import Sequence

import torch

from engine.batch.forecast import arrange_replica
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.devices import pick_device, pick_dtype
from engine.errors import UserError
from engine.given.frames import GivenFrames
from engine.planner.arrange import Arrangement
from launch.arguments.replicas import Replicas
from launch.ranks.ray_pool import NoRayError, check_placement, check_ray


def resolve_model(config: RunConfig, options: Replicas) -> RunConfig:
    """Resolve device and dtype to names; the driver need not have the GPUs of its replicas."""
    name = config.model.device
    if name == "auto":
        here = options.ray is None and torch.cuda.is_available()
        name = "cuda" if here or (options.ray is not None and options.gpus) else "cpu"
    if options.gpus and name == "cpu":
        raise UserError(
            "--gpus_per_replica asks for GPUs, but the model would run on the CPU "
            + ("(model.device cpu); leave one of them out" if config.model.device == "cpu" else "here: torch sees none")
        )
    if name == "cuda" and options.ray is not None and not options.gpus:
        raise UserError("model.device is cuda: give --gpus_per_replica, so that Ray reserves the GPUs")
    dtype = str(pick_dtype(config.model.dtype, torch.device(name))).removeprefix("torch.")
    model = dataclasses.replace(config.model, device=name, dtype=dtype)
    # Progress bars of several replicas would overwrite each other; the table shows the steps.
    output = dataclasses.replace(config.output, progress="off")
    return dataclasses.replace(config, model=model, output=output)


def fix_degrees(config: RunConfig, degrees: tuple[int, int, int]) -> RunConfig:
    """Set the degrees explicitly, so that every replica uses the same."""
    names = ("cfg", "ring", "ulysses")
    return dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, **dict(zip(names, degrees, strict=True)))
    )


def arrange_variants(
    config: RunConfig,
    variants: Sequence[Variant],
    options: Replicas,
    *,
    gpu: str | None = None,
    given: GivenFrames | None = None,
) -> tuple[RunConfig, list[Variant], Arrangement]:
    """Set device, dtype and degrees of a run and its variants explicitly, so that every replica uses the same."""
    config = resolve_model(config, options)
    device, variants = torch.device(config.model.device), [variant.sharing(config) for variant in variants]
    arrangement = arrange_replica(variants, options.ranks, device, gpu=gpu, nodes=options.nodes, given=given)
    config = fix_degrees(config, arrangement.degrees)
    return config, [variant.sharing(config) for variant in variants], arrangement


def arrange_for(
    config: RunConfig, variants: Sequence[Variant], replicas: Replicas | None
) -> tuple[RunConfig, list[Variant]]:
    """Arrange and check a run and its variants for replicas; unchanged if this process makes the videos."""
    if replicas is None:
        return config, list(variants)
    config, variants, _ = arrange_variants(config, variants, replicas)
    check_devices(config, replicas)
    return config, variants


def check_devices(config: RunConfig, options: Replicas) -> None:
    """Raise UserError if this machine has fewer GPUs than ranks, or Ray cannot be used."""
    try:
        check_placement(options.strategy, address=options.ray, num_ranks=options.ranks)
        if options.ray is not None:
            check_ray(options.ray)
    except NoRayError as error:
        raise UserError(str(error)) from error
    # No other machine joins a local Ray, so its replicas would wait for GPUs forever.
    if options.ray == "local" and options.gpus:
        kind = "cuda"
    else:
        kind = pick_device(config.model.device).type if options.ray is None else "cpu"
    wanted, there = options.ranks * options.replicas, torch.cuda.device_count()
    if kind == "cuda" and wanted > there:
        less = "use fewer" if there else "leave --gpus_per_replica out to run on the CPU"
        raise UserError(
            f"{options.replicas} replicas of {options.ranks} ranks need {wanted} GPUs, and this machine has {there}; {less}"
            + (", or give the address of a cluster as --ray" if options.ray == "local" else "")
        )
