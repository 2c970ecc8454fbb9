"""What the ranks of a run must agree on, and what rank 0 hands to the others, over all ranks of a mesh."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.errors import UserError
from engine.load.single_file import find_single_file
from engine.load.weights import deciding_files
from parallel import collectives
from parallel.collectives import CollectiveTrace, ignore_bytes
from parallel.mesh import SeqMesh

Result = TypeVar("Result")

# A checkpoint of 28 GB takes 15 s or more to hash, on every rank at every start; so of a file that is larger than this, a sample.
_WHOLE_BYTES = 64 << 20
_HEAD_BYTES = 1 << 20  # holds the header of a safetensors file
_SAMPLE_EVERY, _SAMPLE_BYTES = 4 << 20, 4 << 10


def fingerprints(config: RunConfig, folder: Path, *, from_hub: bool) -> dict[str, bytes]:
    """SHA-256 of each thing that all ranks must have alike: seed, path, settings, checkpoint.

    Of a hub checkpoint the JSON files count, and its commit: one rank may not have downloaded its weights yet.
    """
    # The folder of a hub checkpoint is called after its commit; a local one may be called anything.
    version = folder.resolve().name if from_hub else ""
    files = [path for path in deciding_files(folder) if path.suffix == ".json" or not from_hub]
    single = find_single_file(config.model)
    return setting_prints(config) | {"checkpoint": _digest_checkpoint(folder, version, files, single)}


def setting_prints(config: RunConfig) -> dict[str, bytes]:
    """The part of `fingerprints` that needs no checkpoint. Of the output only the trace counts, which all ranks make."""
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
    """The message of the first rank that has one, on every rank: a rank's fault ends all ranks together."""
    encoded = (message or "").encode(errors="replace")  # names of files may be no text
    sizes = [int(size) for size in _gather(mesh, torch.tensor([len(encoded)]))]
    if not any(sizes):
        return None
    mine = torch.zeros(max(sizes), dtype=torch.uint8)
    mine[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    rows = zip(_gather(mesh, mine), sizes, strict=True)
    return choose_failure([bytes(row[:size].tolist()).decode() for row, size in rows])


def choose_failure(messages: Sequence[str | None]) -> str | None:
    """The first of the ranks' messages, with its rank unless all ranks say the same; None if there is none."""
    rank, text = next(((rank, text) for rank, text in enumerate(messages) if text), (0, None))
    return text if text is None or all(other == text for other in messages) else f"rank {rank}: {text}"


def raise_together(mesh: SeqMesh, action: Callable[[], Result]) -> Result:
    """What `action` returns; if it is a UserError on any rank, that error on every rank, so that none waits for a lost one."""
    try:
        result, message = action(), None
    except (UserError, OSError) as error:  # OSError: a file that this rank may not read
        result, message = None, str(error) or type(error).__name__  # without words it would count as no fault
    failure = first_failure(mesh, message)
    if failure is not None:
        raise UserError(failure)
    return result


def broadcast(mesh: SeqMesh, x: Tensor, what: str) -> Tensor:
    """Rank 0's tensor on every rank; the others pass one of the same shape and dtype to be filled."""
    return collectives.broadcast(x.contiguous(), source=0, group=mesh.world.group, trace=_trace(what))


def broadcast_bytes(mesh: SeqMesh, data: bytes, what: str) -> bytes:
    """Rank 0's bytes on every rank."""
    size = broadcast(mesh, _on_mesh(mesh, torch.tensor([len(data)])), what)
    buffer = torch.zeros(int(size), dtype=torch.uint8)
    if mesh.world.rank == 0:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else buffer
    return broadcast(mesh, _on_mesh(mesh, buffer), what).cpu().numpy().tobytes() if int(size) else b""


def _gather(mesh: SeqMesh, mine: Tensor) -> list[Tensor]:
    parts = collectives.gather_copies(
        _on_mesh(mesh, mine), "agreement", group=mesh.world.group, trace=_trace("agreement at start")
    )
    return [part.cpu() for part in parts]


def _on_mesh(mesh: SeqMesh, x: Tensor) -> Tensor:
    """NCCL moves tensors of its own device only."""
    return x.to(mesh.device_mesh.device_type)


def _trace(what: str) -> CollectiveTrace:
    return CollectiveTrace(label=what, on_bytes=ignore_bytes)


def digest(text: str) -> bytes:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).digest()


def _digest_checkpoint(folder: Path, version: str, files: Sequence[Path], single: Path | None) -> bytes:
    """The checkpoint's version, and names, sizes and contents of its files, and of the one beside it.

    Of a file of more than 64 MiB the contents are its first MiB, its last 4 KiB and 4 KiB of every 4 MiB: other weights in any
    stretch of 4 MiB, such as a matrix of 1536 x 1536 in bf16, are seen; a few changed numbers may not be. The records of
    the videos have the SHA-256 of every whole file (engine/load/provenance.py).
    """
    digest = hashlib.sha256(version.encode())
    named = [(str(file.relative_to(folder)), file) for file in files]
    named += [(single.name, single)] if single is not None else []
    for name, file in named:
        size = file.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with file.open("rb") as opened:
            if size <= _WHOLE_BYTES:
                digest.update(opened.read())
                continue
            digest.update(opened.read(_HEAD_BYTES))
            for start in (*range(_SAMPLE_EVERY, size, _SAMPLE_EVERY), size - _SAMPLE_BYTES):
                opened.seek(start)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.digest()
