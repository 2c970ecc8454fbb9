"""A GPU's datasheet and a few assumed fractions of its peaks, read from a JSON file that names every source."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import freespec
from engine.errors import UserError
from engine.files.trees import parse_json
from engine.paths import SHIPPED, expand

FOLDER = SHIPPED / "configs" / "gpus"
MOST = 1e15
"""Above any number of a GPU; a float represents every integer below it."""
MOST_GPUS = 1024
"""More than one video can use; planning takes seconds at this number."""
EIGH_DIM = 128
"""Channels of the heads that `eigh_seconds` was stated for."""


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One GPU and its links. Each `_fraction` is the share of a peak that programs are assumed to reach.

    Attributes:
        name: its name in tables.
        compute_capability: as NVIDIA writes it, such as 9.0: it decides the available attention kernels and their order.
        memory_gib: memory that a program sees, GiB.
        reserved_gib: the part of it that is not available to tensors: CUDA context, communication buffers, workspaces, fragments.
        bf16_tflops: dense bf16 peak, TFLOP/s.
        tf32_tflops: dense TF32 peak, which convolutions in fp32 use.
        fp32_tflops: fp32 peak without tensor cores, which the product with the fusion matrix uses.
        memory_gb_s: memory bandwidth, GB/s.
        intra_node_gb_s: one direction of one GPU's link to others in its machine, GB/s.
        inter_node_gb_s: one direction of one GPU's share of the network, GB/s.
        gpus_per_node: GPUs of one machine.
        attention_fraction: by kernel, see freespec.kernels; in half precision, of bf16_tflops.
        gemm_fraction: of matrix products, likewise.
        conv_fraction: of the VAE's convolutions, of tf32_tflops.
        fp32_fraction: of products in fp32, of fp32_tflops: with the fusion matrix, and of attention where the model is in fp32.
        memory_fraction: of passes that only read and write, of memory_gb_s.
        link_fraction: of messages, of either link.
        eigh_seconds: both eigendecompositions (fp64, batched over heads) of one layer with heads of `EIGH_DIM` channels, on one GPU.
            A head is decomposed in about as many dependent passes as it has channels, and heads side by side, so that the time
            grows with a head's channels and not with the number of heads.
        sources: the source of each number above.
    """

    name: str
    compute_capability: float
    memory_gib: float
    reserved_gib: float
    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    intra_node_gb_s: float
    inter_node_gb_s: float
    gpus_per_node: int
    attention_fraction: dict[str, float]
    gemm_fraction: float
    conv_fraction: float
    fp32_fraction: float
    memory_fraction: float
    link_fraction: float
    eigh_seconds: float
    sources: dict[str, str]

    def __post_init__(self) -> None:
        """Reject invalid numbers, and numbers without a source."""
        if not isinstance(self.name, str) or not self.name.strip():
            raise UserError(f"name must be a text, got {self.name!r}")
        if not self.attention_fraction:
            raise UserError(
                "attention_fraction is empty; give the share of the peak of cuda_flash, or of another kernel"
            )
        for name, value in self.numbers().items():
            _check_number(name, value)
            if not self.sources.get(name.partition(".")[0]):
                raise UserError(f"sources names no source of {name}; say where the number comes from")
        if self.gpus_per_node != int(self.gpus_per_node):
            raise UserError(f"gpus_per_node must be a whole number, got {self.gpus_per_node}")
        if self.reserved_gib >= self.memory_gib:
            raise UserError(f"reserved_gib {self.reserved_gib:g} leaves nothing of memory_gib {self.memory_gib:g}")

    def numbers(self) -> dict[str, Any]:
        """Every number by name; those of `attention_fraction` as `attention_fraction.KERNEL`."""
        flat: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "attention_fraction":
                flat |= {f"{field.name}.{kernel}": fraction for kernel, fraction in value.items()}
            elif field.name not in ("name", "sources"):
                flat[field.name] = value
        return flat

    @property
    def usable_gib(self) -> float:
        """Memory available to tensors, GiB."""
        return self.memory_gib - self.reserved_gib

    def kernel(self, setting: str, *, half: bool = True) -> str:
        """Resolve attention.kernel on this GPU, in half precision or fp32; `auto` is the kernel that the engine takes.

        The engine chooses among the same candidates by the same rule, from times that it measures; here from the rates that are
        described. cuDNN is that of this process, or, if torch is built without CUDA, that of torch's CUDA builds.
        """
        if setting != "auto":
            return setting
        kernels = freespec.kernels
        major, minor = divmod(round(10 * self.compute_capability), 10)
        names = kernels.cuda_candidates((major, minor), kernels.cudnn_version() or kernels.CUDNN_SINCE, half=half)
        rates = self._attention_rates(half=half)
        known = {name: 1 / rates[name] for name in names if name in rates}
        return kernels.preferred(known) if known else names[0]

    def attention_rate(self, kernel: str, *, half: bool = True) -> float:
        """Assumed share of the peak of a kernel from freespec.kernels; `auto` as `kernel` has it."""
        missing = self.missing_rate(kernel, half=half)
        if missing is not None:
            own = f"; or give a JSON file of your own as the GPU, with its share of the peak in attention_fraction (like {FOLDER / 'h200.json'})"
            raise UserError(
                f"no time can be predicted: {missing}; plan with one of these as attention.kernel{own if half else ''}"
            )
        return self._attention_rates(half=half)[self.kernel(kernel, half=half)]

    def missing_rate(self, kernel: str, *, half: bool = True) -> str | None:
        """Describe the missing rate of a kernel on this GPU; None if it is known."""
        name, rates = self.kernel(kernel, half=half), self._attention_rates(half=half)
        if name in rates:
            return None
        described = f"attention_fraction of {self.name}" if half else f"the description of {self.name} in float32"
        return f"{described} has no {name}, it has {', '.join(rates)}"

    def _attention_rates(self, *, half: bool) -> dict[str, float]:
        return self.attention_fraction if half else {"cuda_efficient": self.fp32_fraction}


def check_count(count: int) -> None:
    """Raise UserError for a number of GPUs out of range."""
    if not 1 <= count <= MOST_GPUS:
        raise UserError(
            f"cannot plan for {count} GPUs; give 1 to {MOST_GPUS} (a run with parallel.plan manual needs no plan)"
        )


def _check_number(name: str, value: Any) -> None:
    """Raise UserError unless the value is a number in this field's range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} must be a number, got {value!r}")
    if not abs(value) < MOST:  # NaN as well
        raise UserError(f"{name} must be finite and less than {MOST:g}, got {_short(value)}")
    if not (0 <= value if name in ("reserved_gib", "eigh_seconds") else 0 < value):
        raise UserError(f"{name} must be more than 0, got {value}")
    if "fraction" in name and value > 1:
        raise UserError(f"{name} is a fraction of a peak and must be at most 1, got {value}")


def _short(value: float) -> str:
    """A number, shortened to fit a line."""
    return f"{value:g}" if isinstance(value, float) else f"a number of {value.bit_length()} bits"


def read_gpu(name: str) -> GpuSpec:
    """Read one of configs/gpus by name, or a JSON file with the same keys; UserError if it is invalid."""
    known = sorted(path.stem for path in FOLDER.glob("*.json"))
    path = FOLDER / f"{name}.json" if name in known else expand(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"unknown GPU {name!r}; choose one of {', '.join(known)}, or give a JSON file") from error
    tree = parse_json(data, str(path), remedy=f"{FOLDER} has examples")
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be an object with the keys of {FOLDER / 'h200.json'}")
    fields = {field.name for field in dataclasses.fields(GpuSpec)}
    for what, keys in (("lacks", fields - set(tree)), ("has the unknown", set(tree) - fields)):
        if keys:
            raise UserError(f"{path} {what} {', '.join(sorted(keys))}; see {FOLDER / 'h200.json'}")
    for key in ("attention_fraction", "sources"):
        if not isinstance(tree[key], dict):
            raise UserError(f"{path}: {key} must be an object, got {tree[key]!r}")
    try:
        return GpuSpec(**tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
