"""The weights that VBench-Long loads for the six dimensions: their paths, and checks for missing or broken files.

VBench downloads missing files with wget, git and unzip during a run. Here all files are checked first, and the run is
offline. The paths are those of Vchitect/VBench at commit 45e79ec, in local mode; docs/vbench.md
says where the files come from.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.files.whole import file_sha256

_TORCH = Path(".cache/torch")
_VBENCH = Path(".cache/vbench")
_HUB = _TORCH / "hub"
_DINO_CODE = "the files of github.com/facebookresearch/dino, branch main"
_DINO = "dino_vitbase16_pretrain.pth"
_DINO_URL = "dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
_DREAMSIM = "dreamsim_ensemble_checkpoint.zip of the release v0.2.0-checkpoints of github.com/ssundaram21/dreamsim"
_CLIP = "openaipublic.azureedge.net/clip/models"
_CLIP_B = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_CLIP_L = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A file or folder that a dimension loads.

    Attributes:
        place: path below the weights folder, which is HOME while VBench runs.
        source: origin.
        marker: for a folder, a file that it must contain; None for a file.
        sha256: first digits of the file's hash, if published, else "".
    """

    place: Path
    source: str
    marker: str | None = None
    sha256: str = ""


_DINO_WEIGHTS = Weight(place=_HUB / "checkpoints" / _DINO, source=_DINO_URL)

WEIGHTS: dict[str, tuple[Weight, ...]] = {
    "subject_consistency": (
        Weight(place=_VBENCH / "dino_model/facebookresearch_dino_main", source=_DINO_CODE, marker="hubconf.py"),
        # Checked at this path, but loaded from the next: the hub's code ignores this one.
        Weight(place=_VBENCH / "dino_model" / _DINO, source=f"{_DINO_URL} (a link to the next will do)"),
        _DINO_WEIGHTS,
        Weight(
            place=_HUB / "facebookresearch_dinov2_main",
            source="the files of github.com/facebookresearch/dinov2, branch main",
            marker="hubconf.py",
        ),
        Weight(
            place=_HUB / "checkpoints/dinov2_vitb14_pretrain.pth",
            source="dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        ),
    ),
    "background_consistency": (
        Weight(place=_VBENCH / "clip_model/ViT-B-32.pt", source=f"{_CLIP}/{_CLIP_B}/ViT-B-32.pt", sha256=_CLIP_B),
        *(
            Weight(place=Path(".cache") / name, source=_DREAMSIM)
            for name in (
                "dino_vitb16_pretrain.pth",
                "clip_vitb16_pretrain.pth.tar",
                "open_clip_vitb16_pretrain.pth.tar",
            )
        ),
        Weight(place=Path(".cache/ensemble_lora"), source=_DREAMSIM, marker=""),
        # DreamSim moves the hub's folder to ~/.cache.
        Weight(place=Path(".cache/facebookresearch_dino_main"), source=_DINO_CODE, marker="hubconf.py"),
        Weight(place=Path(".cache/checkpoints") / _DINO, source=_DINO_URL),
    ),
    "motion_smoothness": (
        Weight(place=_VBENCH / "amt_model/amt-s.pth", source="huggingface.co/lalala125/AMT (CC BY-NC 4.0)"),
    ),
    "dynamic_degree": (
        Weight(
            place=_VBENCH / "raft_model/models/raft-things.pth",
            source="models.zip of github.com/princeton-vl/RAFT",
        ),
    ),
    "aesthetic_quality": (
        Weight(place=_VBENCH / "clip_model/ViT-L-14.pt", source=f"{_CLIP}/{_CLIP_L}/ViT-L-14.pt", sha256=_CLIP_L),
        Weight(
            place=_VBENCH / "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
            source="github.com/LAION-AI/aesthetic-predictor",
        ),
    ),
    "imaging_quality": (
        Weight(
            place=_VBENCH / "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
            source="the release v0.1-weights of github.com/chaofengc/IQA-PyTorch (non-commercial)",
            sha256="358bb6af",
        ),
    ),
}


def missing_weights(root: Path, dimensions: Iterable[str]) -> list[str]:
    """One line for each file or folder that the dimensions need and that is missing, empty or not what it should be."""
    needed: dict[Path, tuple[Weight, list[str]]] = {}
    for dimension in dimensions:
        for weight in WEIGHTS[dimension]:
            needed.setdefault(weight.place, (weight, []))[1].append(dimension)
    return [
        f"{fault}: {root / weight.place} (for {', '.join(users)}), from {weight.source}"
        for weight, users in needed.values()
        if (fault := _fault(root / weight.place, weight)) is not None
    ]


def _fault(path: Path, weight: Weight) -> str | None:
    return _folder_fault(path, weight.marker) if weight.marker is not None else _file_fault(path, weight.sha256)


def _folder_fault(path: Path, marker: str) -> str | None:
    if not path.is_dir():
        return "missing folder"
    if not any(path.iterdir()):
        return "empty folder"
    return None if not marker or (path / marker).is_file() else f"folder without {marker}"


def _file_fault(path: Path, sha256: str) -> str | None:
    if not path.is_file():
        return "missing file"
    if path.stat().st_size == 0:
        return "empty file"
    return (
        None if not sha256 or file_sha256(path).startswith(sha256) else "file with another SHA-256 than was published"
    )
