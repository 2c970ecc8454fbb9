"""The code that Inductor makes of a function on a CPU, read and not compiled: no C++ compiler is needed."""

import math
import re
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
import torch._inductor.cpu_vec_isa  # before it is patched
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering


class Lowered(Exception):  # noqa: N818 - how lowering ends here, not a fault
    """The code is there."""


def code_of(function: Callable[..., Any], *inputs: Any) -> str:
    """The wrapper that Inductor writes for the first graph of `function`: its buffers and calls."""
    made: list[str] = []

    def stop(graph: GraphLowering) -> None:
        code, _ = graph.codegen()
        made.append(code.value)
        raise Lowered

    # Whatever answers to --version is taken for a compiler, and no instruction set is tried out.
    settings = {"cpp.cxx": (None, sys.executable), "fx_graph_cache": False, "compile_threads": 1}
    with (
        torch._inductor.config.patch(settings),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        mock.patch.object(torch._inductor.cpu_vec_isa, "valid_vec_isa_list", list),
    ):
        torch.compiler.reset()
        try:
            torch.compile(function, fullgraph=True)(*inputs)
        except InductorError as error:
            if "Lowered" not in str(error):
                raise
    torch.compiler.reset()
    return made[0]


def buffers(code: str) -> list[int]:
    """Numbers of elements of the buffers that the code allocates."""
    shapes = re.findall(r"= empty_strided_cpu\(\(([\d, ]*)\)", code)
    return [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]
