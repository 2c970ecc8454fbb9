"""The GPU benchmark in tiny sizes on the CPU: every section runs and reports correctly, and a failing one affects no other."""

import argparse
import importlib
import json
import math
import os
import re
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
import torch.distributed as dist
from torch.autograd import DeviceType

from benchmarks import gpu, gpu_report
from benchmarks.measure import ROOT, round_robin
from benchmarks.sections import correctness, optional, steps
from benchmarks.sections import layer as layer_section
from benchmarks.sections import model as model_section
from benchmarks.sections import ranks as ranks_section
from benchmarks.sections.bench import Bench
from benchmarks.sections.trace import largest
from engine.ranks.group_of_one import GROUP_OF_ONE
from freespec import spectrum
from freespec.methods import FreeSpec
from freespec.sage import sage_kernel
from parallel.xfuser import xfuser_attention
from tests.freespec import sage_stand_in
from tests.freespec.test_triton_dual import needs_triton
from tests.parallel import xfuser_stand_in
from tests.pretend_cuda import pretend_cuda


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
    assert set(files) == set(gpu.SECTIONS) == set(gpu_report.ROWS)
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
        assert fused["within rounding"] is True


def test_a_wrong_result_fails_its_section() -> None:
    fine = {"within rounding": True}
    results = {"attention, wan": {"a": fine, "left_out": {"b": "no"}, "c": {"does not run": "no"}}, "fusion, wan": fine}
    correctness.refuse_wrong(results)
    for name, wrong in (
        ("attention, wan", {"b": {"within rounding": False}}),
        ("fusion, wan", {"within rounding": False}),
    ):
        with pytest.raises(ValueError, match=f"not within rounding of fp64: {name}"):
            correctness.refuse_wrong(results | {name: wrong})


def test_a_wrong_fusion_is_not_within_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(section="correctness", device=torch.device("cpu"), small=True, out=tmp_path, deadline=math.inf)
    assert correctness.fusion(bench, bench.shapes["wan"])["within rounding"] is True
    apart = spectrum.local_basis_matrix
    monkeypatch.setattr(spectrum, "local_basis_matrix", lambda *grams, **named: 1.001 * apart(*grams, **named))
    assert correctness.fusion(bench, bench.shapes["wan"])["within rounding"] is False


def test_sections_fit_into_nine_minutes_and_each_has_its_own() -> None:
    names = list(gpu.SECTIONS)
    total = sum(gpu.SECTIONS.values()) + gpu.GRACE * len(names)
    assert total <= 60 * gpu.MINUTES < 540
    left = 60 * gpu.MINUTES
    for name in names:  # each takes all that it may, and the time after it
        limit = gpu.limit_of(name, names, left)
        assert limit >= gpu.SECTIONS[name]
        left -= limit + gpu.GRACE
    assert left == pytest.approx(0)
    # What the first leaves goes to the second, and a section alone has all the time.
    assert gpu.limit_of("layer", names, 60 * gpu.MINUTES - 10) > gpu.SECTIONS["layer"] + 30
    assert gpu.limit_of("trace", ["trace"], 100) == 100 - gpu.GRACE


def test_rounds_go_there_and_back() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    round_robin(calls, torch.device("cpu"), 3)
    assert "".join(order) == "abccbaabc"


def test_shares_of_a_cuda_profile_are_of_kernels_alone() -> None:
    """An operator's row and a named region's row have the time of the same kernels."""

    def event(
        key: str, kind: DeviceType, device_us: float, cpu_us: float, named: bool = False
    ) -> types.SimpleNamespace:
        times = {"self_device_time_total": device_us, "self_cpu_time_total": cpu_us}
        return types.SimpleNamespace(key=key, device_type=kind, is_user_annotation=named, count=2, **times)

    events = [
        event("aten::mm", DeviceType.CPU, 3000, 20),
        event("gemm_kernel", DeviceType.CUDA, 3000, 0),
        event("copy_kernel", DeviceType.CUDA, 1000, 0),
        event("a region", DeviceType.CUDA, 4000, 0, named=True),
        event("a region", DeviceType.CPU, 4000, 60, named=True),
    ]
    assert [(row["name"], row["ms"], row["share"]) for row in largest(events, cuda=True)] == [
        ("gemm_kernel", 3.0, 0.75),
        ("copy_kernel", 1.0, 0.25),
    ]
    assert [(row["name"], row["share"]) for row in largest(events, cuda=False)] == [("aten::mm", 1.0)]


def test_a_step_is_timed_without_putting_the_method_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(section="steps", device=torch.device("cpu"), small=True, out=tmp_path, deadline=math.inf)
    subject, log = model_section.make_subject(bench, layers=1), []
    on = model_section.apply_method

    def apply(*args: Any, **settings: Any) -> Any:
        log.append("on")
        return on(*args, **settings)

    def seconds_and_peak(call: Any) -> dict[str, float]:
        log.append("timed")
        call()
        return {"seconds": float(len(log))}

    monkeypatch.setattr(model_section, "apply_method", apply)
    monkeypatch.setattr(bench, "seconds_and_peak", seconds_and_peak)
    stock = type(subject.pipe.transformer.blocks[0].attn1.processor)
    found = steps.measure(bench, subject, steps.Step(method=FreeSpec()), kernel="auto", passes=1)
    assert (found["seconds"], log) == (2.0, ["on", "timed"])
    assert type(subject.pipe.transformer.blocks[0].attn1.processor) is stock


class Killed(BaseException):
    """The process of a section ends here, as if its time were up."""


def kill(*_args: Any, **_settings: Any) -> None:
    raise Killed


def bench_of(section: str, folder: Path) -> Bench:
    bench = Bench(section=section, device=torch.device("cpu"), small=True, out=folder, deadline=math.inf)
    bench.start()
    return bench


def on_disk(bench: Bench) -> dict[str, Any]:
    """What a reader finds of a section that is still running."""
    return json.loads((bench.out / f"{bench.section}.json").read_text())["results"]


def test_each_variant_is_written_as_it_is_measured_and_what_compiles_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole order of the section, with Triton's calls by the strided ones."""
    bench, order = bench_of("layer", tmp_path), []
    monkeypatch.setattr(
        layer_section,
        "triton_calls",
        lambda bench, shape, qkv, _refused: {
            "dual triton": layer_section.dense_calls(shape, qkv, bench.kernels()[0])["dual plain"]
        },
    )
    add_time = layer_section.LayerRun.add_time

    def checked(layer: layer_section.LayerRun, name: str, seconds: float) -> None:
        add_time(layer, name, seconds)
        order.append((layer.name, name))
        assert on_disk(bench)[layer.name]["variants"][name]["wall_s"]["median"] > 0

    monkeypatch.setattr(layer_section.LayerRun, "add_time", checked)
    svd = layer_section.svd_against_grams

    def long_svd(bench: Bench, shape: Any) -> dict[str, Any]:
        order.append(("", "svd"))
        return svd(bench, shape)

    monkeypatch.setattr(layer_section, "svd_against_grams", long_svd)
    layer_section.run(bench)
    names = [name for _, name in order]
    first = next(i for i, name in enumerate(names) if "triton" in name or "Flex" in name)
    assert names.count("svd") == 2
    assert not any("triton" in name or "Flex" in name for name in names[:first])
    assert set(names[first:]) == {"dual triton", layer_section.FLEX}
    assert {model for model, name in order if name == "dual triton"} == {"wan", "ltx"}
    for model in ("wan", "ltx"):
        ratios = on_disk(bench)[model]["ratios"]
        assert {
            "dual / global",
            "fusion / dual",
            "dual triton / dual strided",
            "local FlexAttention / local strided",
        } <= set(ratios)


@pytest.mark.parametrize("where", ["triton_calls", "flex_call", "svd_against_grams"])
def test_a_layer_that_ends_in_what_comes_last_keeps_the_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    bench = bench_of("layer", tmp_path)
    monkeypatch.setattr(layer_section, where, kill)
    with pytest.raises(Killed):
        layer_section.run(bench)
    files = {"layer": {"results": on_disk(bench)}}
    lost = {
        what
        for what, section, path, *_ in gpu_report.GOALS
        if section == "layer" and gpu_report.look_up(files, section, path) is None
    }
    lost |= {
        what
        for what, section, path in gpu_report.BESIDE
        if section == "layer" and gpu_report.look_up(files, section, path) is None
    }
    triton = "Triton / strided dual (kept if it wins by 3 %)"
    assert lost <= {triton} | ({"literal SVD fusion / ours"} if where == "svd_against_grams" else set())


def test_an_svd_that_fails_or_has_no_time_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def svd(_bench: Bench, _shape: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    bench = bench_of("layer", tmp_path)
    monkeypatch.setattr(layer_section, "svd_against_grams", svd)
    run = layer_section.LayerRun(bench=bench, name="wan", shape=bench.shapes["wan"])
    layer_section.long_svd(run)
    assert "OutOfMemory" in on_disk(bench)["wan"]["left_out"]["literal SVD"]
    bench.deadline = time.monotonic()
    layer_section.long_svd(run)
    assert on_disk(bench)["wan"]["left_out"]["literal SVD"] == "less than 20 s are left"


def test_what_a_device_cannot_do_of_the_fusion_costs_that_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> None:
        raise RuntimeError("no such kernel")

    bench = bench_of("layer", tmp_path)
    monkeypatch.setattr(spectrum, "reconstruct", refuse)
    layer_section.dense_and_fusion(layer_section.LayerRun(bench=bench, name="wan", shape=bench.shapes["wan"]))
    found = on_disk(bench)["wan"]
    assert {"fusion", "apply"} <= set(found["left_out"])
    assert {"grams", "eigh", "matrix product", "dual plain"} <= set(found["variants"])
    assert "dual / global" in found["ratios"]


def test_triton_is_checked_after_all_that_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of("correctness", tmp_path)
    monkeypatch.setattr(correctness, "select_dual", kill)
    with pytest.raises(Killed):
        correctness.run(bench)
    found = on_disk(bench)
    assert set(found) == {"attention, wan", "attention, ltx", "fusion, wan", "fusion, ltx"}
    assert all({"plain", "cpu_flash"} <= set(found[f"attention, {model}"]) for model in ("wan", "ltx"))


def test_steps_that_need_other_packages_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, order = bench_of("steps", tmp_path), []
    take = steps.StepRuns.take

    def taken(runs: steps.StepRuns, name: str, step: steps.Step, round_: int) -> None:
        take(runs, name, step, round_)
        order.append(name)
        assert name in on_disk(bench)["steps"]

    monkeypatch.setattr(steps.StepRuns, "take", taken)
    monkeypatch.setattr(steps, "_xfuser", lambda *_args: {steps.XFUSER: steps.Step(method=steps.Direct())})
    monkeypatch.setattr(steps, "_triton_dual", kill)
    with pytest.raises(Killed):
        steps.run(bench)
    every = list(steps.variants())
    assert order == [*every, *every[::-1], steps.XFUSER, steps.XFUSER]
    assert {"literal", "runs", "ratios"} <= set(on_disk(bench))
    assert f"{steps.XFUSER} / direct" in on_disk(bench)["ratios"]


def test_every_share_of_a_rank_is_written_as_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, seen = bench_of("ranks", tmp_path), []
    rounds = Bench.rounds

    def until(bench: Bench, calls: Any, add_time: Any) -> None:
        def checked(name: str, seconds: float) -> None:
            add_time(name, seconds)
            seen.append(name)
            assert on_disk(bench)["wan"]["rows"][name]["wall_s"]["median"] > 0
            if len(seen) == 3:
                raise Killed

        rounds(bench, calls, checked)

    monkeypatch.setattr(Bench, "rounds", until)
    with pytest.raises(Killed):
        ranks_section.run(bench)
    assert set(on_disk(bench)["wan"]["rows"]) == set(seen)


def test_a_share_that_does_not_run_costs_that_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise torch.OutOfMemoryError("out of memory")

    bench = bench_of("ranks", tmp_path)
    monkeypatch.setattr(ranks_section, "ring_calls", lambda *_args: {"ring 2 dual": refuse})
    ranks_section.run(bench)
    for model in ("wan", "ltx"):
        assert list(on_disk(bench)[model]["left_out"]) == ["ring 2 dual"]
        assert {"ulysses 1 dual", "ulysses 2 dual", "ring 2 fusion"} <= set(on_disk(bench)[model]["rows"])
    assert "left_out, ring 2 dual: OutOfMemoryError" in "".join(gpu_report.show("ranks", on_disk(bench)))


def test_a_section_without_time_leaves_no_figures_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "decode.json").write_text("{}")
    args = argparse.Namespace(small=True, out=tmp_path)
    assert gpu.run_section("decode", args, 0.0) == ("not started", "the time is up")
    assert not (tmp_path / "decode.json").exists()


def test_without_a_gpu_it_says_so_before_any_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "torch sees no CUDA device; --small runs the same code" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("section", ["correctness", "layer", "steps", "ranks", "decode", "compiled", "optional"])
def test_a_section_runs_on_a_pretended_gpu(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 and with the names of a GPU's kernels; all but the trace, whose profiler asks the driver.

    The page shows what is on disk after each figure, as if the section had ended there.
    """
    record = Bench.record

    def shown(bench: Bench, name: str, value: Any) -> Any:
        record(bench, name, value)
        assert gpu_report.show(section, on_disk(bench))
        return value

    monkeypatch.setattr(Bench, "record", shown)
    module = importlib.import_module(f"benchmarks.sections.{section}")
    bench = Bench(section=section, device=torch.device("cuda"), small=True, out=tmp_path, deadline=math.inf)
    with pretend_cuda():
        bench.start()
        module.run(bench)
    if section == "steps":
        assert set(bench.results["steps"]) == set(steps.variants())
    for found in bench.results.values():
        if isinstance(found, dict):
            assert not {"cuda_flash", "cuda_cudnn", "fusion", "grams", "eigh"} & set(found.get("left_out", {}))


def test_memory_and_rates_are_noted(files: gpu_report.Files) -> None:
    for model_name in ("wan", "ltx"):
        variants = files["layer"]["results"][model_name]["variants"]
        assert all("peak_extra_mib" in variants[name] for name in ("fusion", "grams", "eigh", "apply", "merge"))
        rows = files["ranks"]["results"][model_name]["rows"]
        assert {"ulysses 1 fusion", "ulysses 2 fusion", "ring 2 fusion", "ring 8 fusion"} <= set(rows)
        assert all("peak_extra_mib" in row and ("tflops" in row) == (row["mode"] != "fusion") for row in rows.values())


def test_the_predicted_fusion_says_what_it_assumes() -> None:
    row = gpu_report.predicted_fusion()["fusion / dual attention"]
    assert row.startswith("0.020 with cuda_flash, 0.034 with cuda_cudnn")
    assert row.endswith("`eigh` 4 ms")
    assert row in {cell for line in gpu_report.goals({}, {}) for cell in line}


@needs_triton
def test_triton_is_measured_too(files: gpu_report.Files) -> None:
    for model in ("wan", "ltx"):
        assert files["correctness"]["results"][f"attention, {model}"]["triton"]["within rounding"] is True
        layer = files["layer"]["results"][model]
        assert {"dual triton", "dual triton with Grams", "far triton"} <= set(layer["variants"])
        assert {"dual triton / dual strided", "far triton / far strided"} <= set(layer["ratios"])


def test_far_keys_are_measured_against_explicit_weights(files: gpu_report.Files) -> None:
    for model in ("wan", "ltx"):
        variants = files["layer"]["results"][model]["variants"]
        far = {name: found["error"]["global"] for name, found in variants.items() if name.startswith("far ")}
        exact = {name: found["error"]["global"] for name, found in variants.items() if name.startswith("dual ")}
        assert 0 < max(far.values()) < 4 * max(exact.values())


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
    assert {name for name, row in results["steps"].items() if row["passes"] == 1} == {
        "freelong",
        "freepca",
        "freepca late",
    }


def test_the_literal_fusion_is_scaled_from_one_layer(files: gpu_report.Files) -> None:
    found = files["steps"]["results"]["literal"]
    assert re.fullmatch(
        r"one pass of one layer, \S+ s, and ours, \S+ s; the difference, times 2 layers and 2 passes, is added to our step",
        found["measured"],
    )


def test_a_literal_fusion_that_takes_longer_makes_a_longer_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With seconds that are given: those of tiny sizes are noise, and their difference may be either side of 0."""
    bench = Bench(section="steps", device=torch.device("cpu"), small=True, out=tmp_path, deadline=math.inf)
    monkeypatch.setattr(
        steps,
        "measure",
        lambda _bench, _subject, step, **_settings: {
            "seconds": 5.0 if type(step.method) is steps.LiteralFreeSpec else 2.0
        },
    )
    found = steps.literal(bench, model_section.make_subject(bench, layers=1), "auto", [10.0], layers=30)
    assert found["step_s"] == 10.0 + 2 * 30 * (5.0 - 2.0)
    assert found["literal SVD / freespec dual"] == 19.0
    assert "not measured" in steps.literal(bench, model_section.make_subject(bench, layers=1), "auto", [], layers=30)


def test_a_mode_is_one_graph_for_all_layers(files: gpu_report.Files) -> None:
    assert {name: row["graphs"] for name, row in files["compiled"]["results"].items()} == {
        "direct": 1,
        "sliding_window": 1,
        "freespec dual": 1,
    }
    assert all(row["layers"] > 1 for row in files["compiled"]["results"].values())


def test_packages_that_are_not_here_are_not_available(files: gpu_report.Files) -> None:
    results = files["optional"]["results"]
    assert results.pop("compared").startswith("one self-attention layer; whole steps")
    assert set(results) == {f"{package}, {model}" for package in ("xfuser", "sage") for model in ("wan", "ltx")}
    for name, found in results.items():
        what = "runs on CUDA only" if name.startswith("xfuser") else "does not run on cpu"
        assert what in found["not available"]
    assert "not available" in "".join(gpu_report.sections(files))


def test_whole_steps_say_that_xfuser_is_not_here(files: gpu_report.Files) -> None:
    results = files["steps"]["results"]
    assert re.match(r"not available: ValueError: xfuser runs on CUDA only", results["direct, xfuser"])
    assert "direct, xfuser" not in results["steps"]
    assert "- direct, xfuser: not available" in "\n".join(gpu_report.sections(files))


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_whole_steps_with_xfuser_are_among_the_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """On the recorded interface, in a group of one; attention that is another shows in the difference."""
    bench = Bench(section="steps", device=torch.device("cpu"), small=True, out=tmp_path, deadline=math.inf)
    monkeypatch.setattr(steps, "check_xfuser", lambda *_args, **_settings: None)
    monkeypatch.setattr(steps, "XFUSER_KERNEL", "auto")
    forward = xfuser_stand_in.xFuserLongContextAttention.forward
    monkeypatch.setattr(
        xfuser_stand_in.xFuserLongContextAttention,
        "forward",
        lambda *args, **settings: factor * forward(*args, **settings),
    )
    with xfuser_stand_in.installed():
        steps.run(bench)
    assert set(bench.results["steps"]) == {*steps.variants(), "direct, xfuser"}
    assert bench.results["ratios"]["direct, xfuser / direct"]["median"] > 0
    difference = bench.results["direct, xfuser, relative difference of a layer's attention"]
    assert (difference < 1e-5) == (factor == 1.0)
    assert not dist.is_initialized()


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
    page = gpu_report.sections({"optional": content | {"results": {"xfuser, wan": found, "sage, wan": quantised}}})
    assert any("sage, wan" in part and "relative difference" in part for part in page)


def test_the_page_shows_every_section_and_warns_of_tiny_sizes(files: gpu_report.Files) -> None:
    page = "\n\n".join(gpu_report.sections(files))
    assert page.count("a check of the code and no measurement") == len(gpu.SECTIONS)
    for name in gpu.SECTIONS:
        assert f"### {name}" in page
    rows = gpu_report.goals(files, {})
    assert all(row[3] != "not measured" for row in rows if "memory" not in row[0] and "Triton" not in row[0])


def test_without_files_nothing_is_claimed() -> None:
    rows = gpu_report.goals({}, {})
    assert rows
    assert all(row[3:] == ["not measured", "", ""] for row in rows)
    assert gpu_report.sections({}) == ["Not measured: there are no files of `benchmarks/gpu.py`."]


@pytest.mark.parametrize(("value", "holds"), [(1.05, "yes"), (1.2, "**no**")])
def test_a_goal_holds_or_not(value: float, holds: str) -> None:
    ratios = {"dual / global": {"median": value}}
    files = {"layer": {"file": "layer.json", "results": {"wan": {"ratios": ratios}}}}
    assert gpu_report.goals(files, {})[0][3:] == [f"{value:.3g}", holds, "`gpu/layer.json`"]


def test_a_section_that_goes_wrong_keeps_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.section_probe", str(tmp_path), "fails=60", "hangs=2", "dies=60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=200)
    expected = {
        "fails": ["failed", "RuntimeError: no such kernel"],
        "hangs": ["timeout", "ended after 2 s; the figures before that are kept"],
        "dies": ["failed", "the process ended with status 7"],
    }
    assert json.loads(done.stdout.splitlines()[-1]) == list(expected.values())
    for kind, told in expected.items():
        content = json.loads((tmp_path / kind / "probe.json").read_text())
        assert [content["status"], content["error"]] == told
        assert content["results"] == {"first": 1.0}


def test_unsupported_kernels_are_a_line_and_wrong_ones_raise(tmp_path: Path) -> None:
    bench = Bench(section="probe", device=torch.device("cpu"), small=True, out=tmp_path, deadline=time.monotonic())

    def unsupported() -> None:
        raise RuntimeError("No available kernel.\nAborting execution.")

    def refuses() -> None:
        raise AssertionError("heads must be even")

    result, why = bench.attempt(unsupported)
    assert result is None
    assert why.startswith("RuntimeError: No available kernel. (test_gpu.py:")
    refused, why = bench.attempt(refuses)
    assert refused is None
    assert why.startswith("AssertionError: heads must be even (test_gpu.py:")
    with pytest.raises(KeyError):
        bench.attempt(lambda: {}["a mistake of ours"])
