"""The GPU benchmark in tiny sizes on the CPU: every section runs and says what it should, and a bad one costs only itself."""

import argparse
import json
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import gpu, gpu_report, report
from benchmarks.measure import ROOT
from benchmarks.sections import optional
from benchmarks.sections.bench import Bench
from engine.group_of_one import GROUP_OF_ONE
from freespec.sage import sage_kernel
from parallel.xfuser import xfuser_attention
from tests.freespec import sage_stand_in
from tests.freespec.test_triton_dual import needs_triton
from tests.parallel import xfuser_stand_in


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> gpu_report.Files:
    """What the command writes; kernels of Triton are interpreted where it is installed."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "trace-dual.json.gz").stat().st_size > 1000
    return gpu_report.read(out)


def figures(tree: Any) -> Iterator[float]:
    """Every number of a tree."""
    if isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from figures(item)
    elif isinstance(tree, int | float):
        yield tree


def test_every_section_is_done_and_says_where_it_ran(files: gpu_report.Files) -> None:
    assert set(files) == set(gpu.SECTIONS) == set(gpu_report.SHOWN)
    for content in files.values():
        assert content["status"] == "done"
        assert content["settings"]["small"] is True
        assert content["environment"]["packages"]["torch"] == torch.__version__
        assert content["environment"]["device"] == "cpu"
        assert {"clocks_before", "clocks_after"} <= set(content["environment"])
        assert all(math.isfinite(number) for number in figures(content["results"]))


def test_every_kernel_path_is_within_rounding_of_fp64(files: gpu_report.Files) -> None:
    results = files["correctness"]["results"]
    for model in ("wan", "ltx"):
        checked = {name: row for name, row in results[f"attention, {model}"].items() if name != "left_out"}
        assert {"plain", "cpu_flash"} <= set(checked)
        assert all(row["within rounding"] is True and row["control"] > 0.1 for row in checked.values())
        fused = results[f"fusion, {model}"]
        assert fused["fused"] < 1e-5
        assert fused["control"] > 1e-2


@needs_triton
def test_triton_is_measured_too(files: gpu_report.Files) -> None:
    for model in ("wan", "ltx"):
        assert files["correctness"]["results"][f"attention, {model}"]["triton"]["within rounding"] is True
        layer = files["layer"]["results"][model]
        assert {"dual triton", "dual triton with Grams"} <= set(layer["variants"])
        assert "dual triton / dual strided" in layer["ratios"]


def test_every_goal_is_found_in_the_files(files: gpu_report.Files) -> None:
    """All but memory, which only a GPU's allocator tells, and Triton, which need not be installed."""
    found = {what: gpu_report.look_up(files, section, path) for what, section, path, *_ in gpu_report.GOALS}
    assert {what for what, value in found.items() if value is None} <= {
        "peak memory, dual step / global step",
        "Triton / strided dual (kept if it wins by 3 %)",
    }
    assert all(gpu_report.look_up(files, section, path) is not None for _, section, path in gpu_report.BESIDE)


def test_steps_add_up_to_runs(files: gpu_report.Files) -> None:
    results = files["steps"]["results"]
    step = {name: row["wall_s"]["median"] for name, row in results["steps"].items()}
    run = results["runs"]["freespec (step, 0.5)"]
    assert run["steps"] == {"dual": 25, "local": 25}
    assert run["seconds"] == pytest.approx(25 * step["freespec dual"] + 25 * step["freespec late"], rel=1e-3)
    assert results["runs"]["freespec (default: timestep)"]["steps"] == {"dual": 45, "local": 5}  # shift 8
    assert results["about"]["kernel"] in ("plain", "cpu_flash")  # the section `layer` chose it


def test_a_mode_is_one_graph_for_all_layers(files: gpu_report.Files) -> None:
    assert {name: row["graphs"] for name, row in files["compiled"]["results"].items()} == {
        "direct": 1,
        "sliding_window": 1,
        "freespec dual": 1,
    }
    assert all(row["layers"] > 1 for row in files["compiled"]["results"].values())


def test_packages_that_are_not_here_are_not_available(files: gpu_report.Files) -> None:
    results = files["optional"]["results"]
    assert set(results) == {f"{package}, {model}" for package in ("xfuser", "sage") for model in ("wan", "ltx")}
    for name, found in results.items():
        what = "runs on CUDA only" if name.startswith("xfuser") else "does not run on cpu"
        assert what in found["not available"]
    assert "not available" in "".join(gpu_report.sections(files, report.table))


def test_a_package_that_is_here_is_compared_in_the_same_rounds(tmp_path: Path) -> None:
    """On the recorded interfaces, in a group of one."""
    bench = Bench(section="optional", device=torch.device("cpu"), small=True, out=tmp_path, deadline=math.inf)
    shape, mesh = bench.shapes["wan"], GROUP_OF_ONE.acquire()
    with xfuser_stand_in.installed():
        found = optional.compare(bench, shape, mesh, xfuser_attention(mesh, kernel="auto"), kernel="plain")
    GROUP_OF_ONE.release()
    assert found["relative difference"] < 1e-5
    assert found["xfuser / ours"]["median"] > 0
    kernel = sage_kernel(sage_stand_in.sageattn)
    with mock.patch.object(optional, "select_complement", lambda *_args, **_settings: kernel):
        quantised = optional.complement(bench, shape)
    assert 1e-4 < quantised["relative difference"] < 3e-2
    content = {
        "environment": {},
        "settings": {"dtype": "float32", "small": True},
        "status": "done",
        "file": "optional.json",
    }
    page = gpu_report.sections(
        {"optional": content | {"results": {"xfuser, wan": found, "sage, wan": quantised}}}, report.table
    )
    assert any("sage, wan" in part and "relative difference" in part for part in page)


def test_the_page_shows_every_section_and_warns_of_tiny_sizes(files: gpu_report.Files) -> None:
    page = "\n\n".join(gpu_report.sections(files, report.table))
    assert page.count("a check of the code and no measurement") == len(gpu.SECTIONS)
    for name in gpu.SECTIONS:
        assert f"### {name}" in page
    rows = gpu_report.goals(files, {})
    assert all(row[3] != "not measured" for row in rows if "memory" not in row[0] and "Triton" not in row[0])


def test_without_files_nothing_is_claimed() -> None:
    rows = gpu_report.goals({}, {})
    assert rows
    assert all(row[3:] == ["not measured", "", ""] for row in rows)
    assert gpu_report.sections({}, report.table) == ["No file of `benchmarks/gpu.py` is here: not measured."]


@pytest.mark.parametrize(("value", "holds"), [(1.05, "yes"), (1.2, "**no**")])
def test_a_goal_holds_or_not(value: float, holds: str) -> None:
    ratios = {"dual / global": {"median": value}}
    files = {"layer": {"file": "layer.json", "results": {"wan": {"ratios": ratios}}}}
    assert gpu_report.goals(files, {})[0][3:] == [f"{value:.3g}", holds, "`gpu/layer.json`"]


def section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Any, limit: float) -> dict[str, Any]:
    """What a section that does `run` leaves in its file."""
    module = types.ModuleType("benchmarks.sections.probe")
    module.run = run
    monkeypatch.setitem(sys.modules, "benchmarks.sections.probe", module)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    status, reason = gpu.run_section("probe", argparse.Namespace(small=True, out=tmp_path), limit)
    content = json.loads((tmp_path / "probe.json").read_text())
    assert (content["status"], content.get("error", "")) == (status, reason)
    return content


def fails(bench: Bench) -> None:
    bench.record("first", 1.0)
    raise RuntimeError("no such kernel\nand more")


def hangs(bench: Bench) -> None:
    bench.record("first", 1.0)
    time.sleep(600)


def dies(bench: Bench) -> None:
    bench.record("first", 1.0)
    os._exit(7)


@pytest.mark.parametrize(
    ("run", "limit", "status", "reason"),
    [
        (fails, 30.0, "failed", "RuntimeError: no such kernel"),
        (hangs, 1.0, "timeout", "ended after 2 s; the figures before that are kept"),
        (dies, 30.0, "failed", "the process ended with status 7"),
    ],
)
def test_a_section_that_goes_wrong_keeps_its_figures(  # noqa: PLR0917
    run: Any, limit: float, status: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = section(monkeypatch, tmp_path, run, limit)
    assert (content["status"], content["error"], content["results"]) == (status, reason, {"first": 1.0})


def test_what_a_device_cannot_do_is_a_line_and_what_is_wrong_is_raised(tmp_path: Path) -> None:
    bench = Bench(section="probe", device=torch.device("cpu"), small=True, out=tmp_path, deadline=time.monotonic())

    def unsupported() -> None:
        raise RuntimeError("No available kernel.\nAborting execution.")

    result, why = bench.attempt(unsupported)
    assert result is None
    assert why.startswith("RuntimeError: No available kernel. (test_gpu.py:")
    with pytest.raises(KeyError):
        bench.attempt(lambda: {}["a mistake of ours"])
