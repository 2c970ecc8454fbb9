"""Weights sharded over ranks by DeepSpeed's ZeRO-3: a rank keeps its share, and a layer is gathered while it runs.

An optional extra. Every rank gathers the same layers in the same order, whatever its tokens and heads are, since the
order is that of the model's layers; DeepSpeed compares the order over all ranks in the first two forwards.
"""

import os
import tempfile
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from parallel.deepspeed import quiet, quiet_import, start_communication

# Layers that are whole at a time: the one that runs, and the next one, which is on its way.
LIVE_LAYERS = 2
# Alignment of a share in a file, so that any dtype can be read.
_ALIGNMENT = 64


def check_zero3(device: torch.device) -> None:
    """Raise ImportError without DeepSpeed, and ValueError where it would use another kind of device than the model."""
    try:
        accelerator = quiet_import("deepspeed.accelerator").get_accelerator()
    except ImportError as error:
        raise ImportError(
            f"model.weights zero3 needs the optional package deepspeed ({error}); pip install '.[deepspeed]'"
        ) from error
    if accelerator.device_name() != device.type:
        raise ValueError(
            f"DeepSpeed uses {accelerator.device_name()} on this machine, and the model is on {device.type}; set "
            f"DS_ACCELERATOR={device.type} in the environment, or another model.device"
        )


def shard_weights(
    module: nn.Module, *, group: dist.ProcessGroup, device: torch.device, keep: Literal["device", "cpu"] = "device"
) -> None:
    """Leave on each rank of the group its share of every parameter: ceil(numel / P) numbers. Buffers stay whole.

    Every rank calls this with the same module, on the CPU; the values are those of rank 0. From then on a forward
    gathers a repeated layer (see `repeated_layers`) in one message while the layer before it runs, the parameters
    outside of those one module at a time, and frees them afterwards. So no rank may leave out
    a forward that others make.

    Args:
        module: any module, for inference only.
        group: the ranks that hold its shares.
        device: where it runs.
        keep: where the share stays; on the CPU it is pinned if the device is a GPU.
    """
    check_zero3(device)
    partition = quiet_import("deepspeed.runtime.zero.partition_parameters")
    offload = quiet_import("deepspeed.runtime.zero.parameter_offload")
    start_communication()
    # DeepSpeed asks the environment which GPU of its machine a rank has; without a launcher there is no answer there.
    os.environ.setdefault("LOCAL_RANK", str(device_index(device)))
    module.requires_grad_(False)
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, buffer.to(device))
    layers = repeated_layers(module)
    for layer in layers:
        quiet_import("deepspeed.utils").set_z3_leaf_module(layer, True)
    largest = max((num_parameters(layer) for layer in layers), default=num_parameters(module))
    with quiet():
        partition.Init(
            module=module,
            data_parallel_group=group,
            mem_efficient_linear=False,  # it would put another linear() into torch for the whole process
            remote_device=None if keep == "device" else "cpu",
            pin_memory=device.type == "cuda",
            dtype=torch.float32,  # of tensors made later; parameters keep theirs
        )
        hooks = offload.DeepSpeedZeRoOffload(
            module,
            timers=None,
            ds_config=None,
            prefetch_bucket_size=largest,
            max_reuse_distance=0,
            max_live_parameters=LIVE_LAYERS * largest,
            param_persistence_threshold=0,
            dp_process_group=group,
        )
    for hook in hooks.backward_hooks:
        hook.remove()


def device_index(device: torch.device) -> int:
    """Which GPU of this machine a device is: `cuda` without a number is the current one. 0 for a CPU."""
    if device.type == "cuda" and device.index is None:
        return torch.cuda.current_device()
    return device.index or 0


def keep_shares_in_file(module: nn.Module, folder: Path) -> None:
    """Move this rank's shares from the CPU's memory into a file of the folder, which the system reads when needed.

    The file has no name and disappears with the process. Raises OSError if there is no room for it.
    """
    shares = [share for parameter in module.parameters() if (share := _share(parameter)) is not None]
    starts = [0]
    for share in shares:
        starts.append(starts[-1] + -(-share.nbytes // _ALIGNMENT) * _ALIGNMENT)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(starts[-1], 1))  # a full drive is an error here, and later a crash
        mapped = torch.from_file(file.name, shared=True, size=starts[-1], dtype=torch.uint8)
    for share, start in zip(shares, starts, strict=False):
        place = mapped[start : start + share.nbytes].view(share.dtype)
        share.data = place.copy_(share)


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the members of its outermost module lists, in order."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    inner = [layer for child in module.children() if child not in lists for layer in repeated_layers(child)]
    return [layer for members in lists for layer in members] + inner


def num_parameters(module: nn.Module) -> int:
    """Number of parameters of a module before sharding."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def held_bytes(module: nn.Module) -> int:
    """Bytes of parameters that this process holds: whole ones, quantised ones and its shares, on any device."""
    return sum(tensor.nbytes for parameter in module.parameters() for tensor in _tensors(parameter))


def device_bytes(module: nn.Module, device: torch.device) -> int:
    """Of `held_bytes`, those on this kind of device; a share in a file counts as the CPU's."""
    held = (tensor for parameter in module.parameters() for tensor in _tensors(parameter))
    return sum(tensor.nbytes for tensor in held if tensor.device.type == device.type)


def _share(parameter: nn.Parameter) -> Tensor | None:
    return getattr(parameter, "ds_tensor", None)


def _tensors(parameter: nn.Parameter) -> list[Tensor]:
    if is_traceable_wrapper_subclass(parameter):  # quantised: numbers and their scales
        return [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
    share = _share(parameter)
    return [parameter.data] if share is None else [parameter.data, share]
