"""Arrange ranks as a mesh: the degrees that the configuration or the planner chooses, and the provider of the head exchange."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch

from engine.checks import check_model
from engine.config import RunConfig
from engine.errors import UserError
from engine.given.frames import GivenFrames
from engine.given.known import refuse_extend
from engine.load.loras import find_local_loras
from engine.load.single_file import is_of_hub, open_single_files
from engine.planner.choose import choose, choose_by_memory
from engine.planner.gpu import FOLDER, GpuSpec, read_gpu
from engine.planner.layout import Degrees
from engine.planner.model import ModelSpec, read_model
from engine.planner.plan import Case
from engine.planner.providers import Support
from engine.ranks.layouts import Ranks
from parallel.attention import TORCH_EXCHANGE
from parallel.deepspeed import check_deepspeed, deepspeed_exchange
from parallel.mesh import SeqMesh, build_mesh
from parallel.shards import SequencePlan
from parallel.xfuser import XfuserAttention, check_xfuser, xfuser_attention


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How `world` ranks share the video, and why; the same on all ranks.

    Attributes:
        degrees: cfg, ring and ulysses.
        plan: tokens and heads of each rank of a sequence.
        why: the reason for the degrees.
    """

    degrees: Degrees
    plan: SequencePlan
    why: str


def arrange_ranks(
    config: RunConfig,
    world: int,
    device: torch.device,
    gpu: GpuSpec | None = None,
    *,
    nodes: Sequence[str] | None = None,
    given: GivenFrames | None = None,
) -> Arrangement:
    """Choose the arrangement from the configuration and the planner, before process groups exist.

    `gpu` describes the ranks' GPUs if they are not those of this machine; None looks at this machine's. `nodes` names the
    node of each rank; None assumes that consecutive ranks fill nodes of the size in the GPU's description. `given` are given frames of
    the video; only the file of `extend` is opened, and only to advise a shorter video.

    Raises UserError for degrees that do not fit the number of ranks or the guidance, or that the provider does not support.
    This is checked before the ranks join, since the first rank to exit then would take the store from the others.
    """
    spec = read_model(config.model)
    refuse_extend(given, spec.video)
    check_settings(config, spec)
    gpu, span = gpu or _find_gpu(device), node_span(nodes) if nodes is not None else None
    if gpu is not None and span is not None:
        gpu = replace(gpu, gpus_per_node=span)
    degrees, why = choose_degrees(config, spec, world, gpu, span=span, given=given)
    if span is not None and span % degrees[2]:
        why += f"; ulysses groups of {degrees[2]} cross nodes"
    plan, provider = _support(config, spec, given).sequence(degrees), config.parallel.provider
    try:
        if provider == "xfuser":
            check_xfuser(plan, device_type=device.type, kernel=config.attention.kernel)
        elif provider == "deepspeed":
            check_deepspeed(plan)
    except (ImportError, ValueError) as error:
        raise UserError(f"parallel.provider {provider}: {error}") from error
    return Arrangement(degrees=degrees, plan=plan, why=why)


def check_settings(config: RunConfig, spec: ModelSpec) -> None:
    """Raise UserError for settings that contradict the checkpoint's JSON files, which the engine would refuse later.

    `plan` calls this too, so that it plans only what can be made. The video's size is checked by `Case`.
    """
    index, transformer, scheduler = (spec.configs[name] for name in ("model_index", "transformer", "scheduler"))
    check_model(config, spec.adapter, spec.video, index=index, transformer=transformer, scheduler=scheduler)
    for lora in find_local_loras(config.model):
        lora.check(spec.adapter, spec.configs["transformer"], f"the transformer of {spec.name}")
    # The engine fetches those of the hub later.
    here = tuple(file for file in config.model.single_files if config.model.offline or not is_of_hub(file))
    if here:
        open_single_files(replace(config.model, single_file=here), spec.adapter)


def join_ranks(config: RunConfig, arrangement: Arrangement, device: torch.device) -> Ranks:
    """Build the mesh over all ranks of the process group; every rank calls this with the same arrangement.

    Raises UserError, on every rank, for a provider that does not support it.
    """
    exchange = deepspeed_exchange(arrangement.plan) if config.parallel.provider == "deepspeed" else TORCH_EXCHANGE
    cfg, ring, ulysses = arrangement.degrees
    timeout = timedelta(seconds=config.parallel.timeout)
    mesh = build_mesh(cfg=cfg, ring=ring, ulysses=ulysses, device=device, timeout=timeout)
    hybrid = _load_xfuser(config, mesh) if config.parallel.provider == "xfuser" else None
    return Ranks(
        mesh=mesh, local_route=config.parallel.local_route, exchange=exchange, hybrid=hybrid, why=arrangement.why
    )


def describe_place(ranks: Ranks, plan: SequencePlan, device: torch.device) -> str:
    """One line with this rank's coordinates and its share of the video, to follow its number."""
    mesh = ranks.mesh
    places = ", ".join(f"{axis.name} {axis.rank} of {axis.size}" for axis in (mesh.cfg, mesh.ring, mesh.ulysses))
    tokens, heads = plan.shards[mesh.sequence.rank], plan.head_shares[mesh.ulysses.rank]
    return (
        f"of {mesh.world.size} ranks, on {device}: {places}; tokens {tokens[0]} to {tokens[1]} of "
        f"{plan.tokens}, in attention heads {heads[0]} to {heads[1]} of {plan.heads}"
    )


def node_span(nodes: Sequence[str]) -> int:
    """The number of consecutive ranks that share a node: groups whose size divides it never cross nodes.

    Groups of consecutive ranks tile the world, so no group crosses a boundary if every boundary is a multiple of its
    size: the answer is the greatest common divisor of the runs of ranks on one node.
    """
    return math.gcd(*(len(list(run)) for _, run in itertools.groupby(nodes)))


def choose_degrees(
    config: RunConfig,
    spec: ModelSpec,
    world: int,
    gpu: GpuSpec | None,
    *,
    span: int | None = None,
    given: GivenFrames | None = None,
) -> tuple[Degrees, str]:
    """Choose (cfg, ring, ulysses), with the reason: the configuration's degrees are kept, the planner or a rule sets the rest.

    `span` is the `node_span` of the ranks, if their nodes are known.

    With a single choice, as on one rank, the planner still checks that the video fits the GPU, unless `parallel.plan` is
    manual.
    """
    fixed = (config.parallel.cfg, config.parallel.ring, config.parallel.ulysses)
    wanted = _support(config, spec, given).possible(world, fixed)
    if len(wanted) == 1:
        if gpu is not None and config.parallel.plan == "auto":
            choose_by_memory(Case.of(config, spec, gpu=gpu, world_size=world, given=given), wanted, wanted[0])
        return wanted[0], "the only arrangement that the configuration allows"
    by_rule = sorted(wanted, key=lambda degrees: _rule(degrees, spec.heads, span or world))
    if gpu is None:  # `parallel.plan manual` sets all degrees
        return by_rule[0], f"no description of this device in configs/gpus; {_RULE}"
    case = Case.of(config, spec, gpu=gpu, world_size=world, given=given)
    missing = case.options.missing_rate(gpu)
    if missing is not None:
        degrees = choose_by_memory(case, by_rule, fixed)
        return degrees, f"no time can be predicted ({missing}); the first that fits the memory by the rule {_RULE}"
    plan = choose(case, fixed)
    return plan.degrees, f"the planner's choice for {gpu.name}: {plan.why}"


def idle_stays(config: RunConfig, degrees: Degrees, device: torch.device) -> bool:
    """Whether a video on ranks of these degrees fits this GPU beside both of two transformers; True without a description of it."""
    gpu = _find_gpu(device)
    if gpu is None or config.model.weights != "resident":
        return True
    case = Case.of(config, read_model(config.model), gpu=gpu, world_size=math.prod(degrees))
    return case.placed(degrees, case.modes).idle_expert == "stay"


def _support(config: RunConfig, spec: ModelSpec, given: GivenFrames | None) -> Support:
    kernel, provider = config.attention.kernel, config.parallel.provider
    beside = len(spec.places(given, config.video).moments)
    return Support.of(
        spec, config.video, config.sampler, config.method, provider=provider, kernel=kernel, beside=beside
    )


_RULE = "cfg first, then ulysses as far as it divides the heads and stays within a node, then ring"


def _rule(degrees: Degrees, heads: int, span: int) -> tuple[bool, bool, bool, int]:
    """Sort key of arrangements if the device is unknown: fewest bytes first, and no all-to-all between nodes."""
    cfg, ring, ulysses = degrees
    return (cfg == 1, heads % ulysses != 0, span % ulysses != 0, ring)


def _find_gpu(device: torch.device) -> GpuSpec | None:
    """The description of this device in configs/gpus, with its actual memory; None if there is none.

    A driver process of a cluster may have no GPU.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    known = match_gpu(properties.name, [path.stem for path in sorted(FOLDER.glob("*.json"))])
    return None if known is None else replace(read_gpu(known), memory_gib=properties.total_memory / 2**30)


def match_gpu(name: str, known: Sequence[str]) -> str | None:
    """Match a device name to a known GPU by whole words: "NVIDIA GeForce RTX 4090" is rtx4090, and "RTX 4070 Ti" not rtx4070."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\s+(ti|super)\b", r"\1", name.lower()))
    spoken = {*words, *(a + b for a, b in itertools.pairwise(words))}
    return next((gpu for gpu in known if gpu in spoken), None)


def _load_xfuser(config: RunConfig, mesh: SeqMesh) -> XfuserAttention:
    try:
        return xfuser_attention(mesh, kernel=config.attention.kernel)
    except ImportError as error:
        raise UserError(f"parallel.provider xfuser: {error}") from error
