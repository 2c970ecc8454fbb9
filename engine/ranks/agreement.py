"""Agreement of all ranks of a mesh, errors raised together, and broadcasts from rank 0."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.errors import UserError, first_line
from engine.ranks.layouts import Ranks
from parallel import collectives
from parallel.collectives import CollectiveError
from parallel.mesh import SeqMesh

Result = TypeVar("Result")

FOR_EVER = timedelta(days=365)
"""How long a rank waits in a store for others that may take any time."""


def setting_prints(config: RunConfig) -> dict[str, bytes]:
    """SHA-256 of what must be equal on all ranks: seed, path and settings; of the output only the trace, which all ranks make."""
    tree = dataclasses.asdict(config)
    tree["output"] = {"trace": tree["output"]["trace"]}
    seed, path = tree["sampler"].pop("seed"), tree["model"].pop("path")
    texts = {"seed": str(seed), "model.path": path, "settings": json.dumps(tree, sort_keys=True)}
    return {name: digest(text) for name, text in texts.items()}


def check_agreement(mesh: SeqMesh, prints: dict[str, bytes]) -> None:
    """Raise UserError on every rank if any rank's fingerprints differ from rank 0's, naming ranks and what differs."""
    mine = torch.tensor([list(value) for value in prints.values()], dtype=torch.uint8)
    refuse_different([dict(zip(prints, map(bytes, row.tolist()), strict=True)) for row in _gather(mesh, mine)])


def refuse_different(prints: Sequence[Mapping[str, bytes]]) -> None:
    """Raise UserError if the fingerprints of any rank, in rank order, differ from rank 0's."""
    for name, expected in prints[0].items():
        other = [rank for rank, of_rank in enumerate(prints) if of_rank[name] != expected]
        if other:
            verb = "has" if len(other) == 1 else "have"
            who = f"rank {other[0]}" if len(other) == 1 else f"ranks {', '.join(map(str, other))}"
            raise UserError(f"{who} {verb} another {name} than rank 0; start all ranks with the same command and files")


def first_failure(mesh: SeqMesh, message: str | None) -> str | None:
    """Return the message of the first rank that has one, on every rank, so that a failing rank ends all ranks together."""
    encoded = (message or "").encode(errors="replace")  # file names need not be valid text
    sizes = [int(size) for size in _gather(mesh, torch.tensor([len(encoded)]))]
    if not any(sizes):
        return None
    mine = torch.zeros(max(sizes), dtype=torch.uint8)
    mine[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    rows = zip(_gather(mesh, mine), sizes, strict=True)
    return choose_failure([bytes(row[:size].tolist()).decode() for row, size in rows])


def choose_failure(messages: Sequence[str | None]) -> str | None:
    """The first of the ranks' messages, with its rank unless all are equal; None without any."""
    rank, text = next(((rank, text) for rank, text in enumerate(messages) if text), (0, None))
    return text if text is None or all(other == text for other in messages) else f"rank {rank}: {text}"


def raise_together(mesh: SeqMesh, action: Callable[[], Result]) -> Result:
    """Return the result of `action`; if it raises UserError on any rank, raise it on every rank, so that none waits for another."""
    results, message = [], None
    try:
        results.append(action())
    except (UserError, OSError) as error:  # OSError: a file that this rank cannot read
        message = str(error) or type(error).__name__  # an empty message would count as success
    failure = first_failure(mesh, message)
    if failure is not None:
        raise UserError(failure)
    return results[0]


def raise_once_all_end(ranks: Ranks, action: Callable[[], Result], what: str) -> Result:
    """`raise_together` of an action that some ranks end long after others, as a download does.

    They wait for each other in the store of the ranks first: a collective waits for `parallel.timeout` at most.
    """

    def act() -> Result:
        try:
            result = action()
        except (UserError, OSError):
            _wait_for_all(ranks, what)
            raise
        _wait_for_all(ranks, what)
        return result

    return raise_together(ranks.mesh, act)


def _wait_for_all(ranks: Ranks, what: str) -> None:
    """Wait, without a timeout, until every rank is here; all ranks come the same number of times. Without a store, do nothing."""
    store, world = ranks.store, ranks.mesh.world
    if store is None:
        return
    try:
        came = store.add(f"here/{what}", 1)
        all_came = f"here/{what}/{(came - 1) // world.size}"
        if came % world.size == 0:
            store.set(all_came, "all")
        store.wait([all_came], FOR_EVER)
    except RuntimeError as error:
        raise CollectiveError(world.rank, what, "waiting in the store", world.ranks, first_line(error)) from error


def broadcast(mesh: SeqMesh, x: Tensor, what: str) -> Tensor:
    """Return rank 0's tensor on every rank; the others pass one of the same shape and dtype to fill."""
    return collectives.broadcast(x.contiguous(), source=0, group=mesh.world.group, trace=mesh.world.trace(what))


def broadcast_bytes(mesh: SeqMesh, data: bytes, what: str) -> bytes:
    """Return rank 0's bytes on every rank."""
    size = broadcast(mesh, _on_mesh(mesh, torch.tensor([len(data)])), what)
    buffer = torch.zeros(int(size), dtype=torch.uint8)
    if mesh.world.rank == 0:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else buffer
    return broadcast(mesh, _on_mesh(mesh, buffer), what).cpu().numpy().tobytes() if int(size) else b""


def from_first(mesh: SeqMesh, action: Callable[[], bytes], what: str) -> bytes:
    """Return on every rank what `action` returns on rank 0, or raise its UserError there."""
    return broadcast_bytes(mesh, raise_together(mesh, lambda: action() if mesh.world.rank == 0 else b""), what)


def _gather(mesh: SeqMesh, mine: Tensor) -> list[Tensor]:
    trace = mesh.world.trace("agreement at start")
    parts = collectives.gather_copies(_on_mesh(mesh, mine), "agreement", group=mesh.world.group, trace=trace)
    return [part.cpu() for part in parts]


def _on_mesh(mesh: SeqMesh, x: Tensor) -> Tensor:
    """Move to the mesh's device, since NCCL takes no other tensors."""
    return x.to(mesh.device_mesh.device_type)


def digest(text: str) -> bytes:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).digest()
