"""Runs on a simulated CUDA device that refuses mixed devices: every tensor is on the right device."""

import contextlib
import dataclasses
import re
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXPipeline, WanPipeline
from torch import Tensor

from engine import apply_method, kernel_choice
from engine.config import (
    AttentionConfig,
    DecodeConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    ParallelConfig,
    RunConfig,
    SamplerConfig,
    VideoConfig,
)
from engine.decode.decoder import open_decoder
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.ranks.layouts import Ranks
from engine.spectra.trace import SpectralTrace
from engine.spectra.windows import WindowSpectra
from freespec import eigen, kernels
from freespec.methods import METHODS, FreeSpec
from freespec.riflex import Riflex
from parallel.mesh import build_mesh
from tests.engine.golden import stop_run
from tests.pretend_cuda import Event, MixedDevicesError, OnCuda, PretendCuda, dispatch, pretend_cuda
from tests.ranks import PATIENCE, run_ranks
from tests.tiny_pipelines import save_random_ltx, save_random_wan

PROMPT = "a red circle"
ADAPTERS = ("wan", "ltx")
SIZES = {
    "wan": VideoConfig(num_frames=29, height=32, width=48),
    "ltx": VideoConfig(num_frames=57, height=64, width=96),
}
TILES = {
    "wan": DecodeConfig(mode="tiled", tile_height=24, tile_width=24, stride_height=16, stride_width=16),
    "ltx": DecodeConfig(mode="tiled", tile_height=64, tile_width=64, stride_height=32, stride_width=32),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "wan": save_random_wan(tmp_path_factory.mktemp("wan")),
        "ltx": save_random_ltx(tmp_path_factory.mktemp("ltx"), conditioned=True, inject_noise=True),
    }


def config_of(folder: Path, name: str, device: str = "cuda", **changes: Any) -> RunConfig:
    config = RunConfig(
        model=ModelConfig(path=str(folder), device=device, dtype="float32"),
        video=SIZES[name],
        sampler=SamplerConfig(num_steps=2, guidance_scale=4.0, seed=3, negative_prompt="bad", max_text_tokens=20),
        method=MethodConfig(name="freespec", window_frames=3, freespec=FreeSpec(domain="step", fused_share=0.5)),
        output=OutputConfig(progress="off"),
    )
    return dataclasses.replace(config, **changes)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert type(actual) is Tensor  # handed out on the CPU
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_the_device_refuses_what_cuda_refuses() -> None:
    with pretend_cuda():
        there, here = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
        assert there.device == torch.device("cuda", 0)
        assert torch.equal((2 * there + torch.tensor(1.0)).cpu(), torch.full((2, 3), 3.0))
        for mix in (
            lambda: there + here,
            lambda: here @ there.mT,
            lambda: torch.cat((there, here)),
            lambda: torch.nn.functional.embedding(torch.zeros(1, dtype=torch.long), there),
            lambda: torch.randn(2, device="cuda", generator=torch.Generator().manual_seed(0)),
        ):
            with pytest.raises(MixedDevicesError):
                mix()
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        layer = torch.nn.Linear(3, 2)
        with pytest.raises(MixedDevicesError):
            layer(there)
        assert isinstance(layer.to("cuda")(there), OnCuda)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_method_makes_the_video_of_the_cpu(folders: dict[str, Path], name: str) -> None:
    def run(device: str) -> dict[str, Tensor]:
        made = {}
        with contextlib.closing(LongVideoEngine(config_of(folders[name], name, device))) as engine:
            for method in METHODS:
                freespec = FreeSpec(domain="step", fused_share=0.5)
                engine.use_method(MethodConfig(name=method, window_frames=3, freespec=freespec))
                made[method] = engine.denoise(PROMPT).latents
            made["native"] = engine.denoise(PROMPT, num_frames=17).latents
        return made

    expected = run("cpu")
    with pretend_cuda():
        actual = run("cuda")
    for method, latents in expected.items():
        assert_close(actual[method], latents)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("transition", ["cut", "fade 8", "relay 8"])
def test_a_timeline_makes_the_video_of_the_cpu(folders: dict[str, Path], name: str, transition: str) -> None:
    prompt, made = f"{PROMPT} [0-12] | a blue star [12-, {transition}]", []
    for device, context in (("cpu", contextlib.nullcontext()), ("cuda", pretend_cuda())):
        with context, contextlib.closing(LongVideoEngine(config_of(folders[name], name, device))) as engine:
            inside: list[str] = []
            blocks = engine.pipe.transformer.blocks if name == "wan" else engine.pipe.transformer.transformer_blocks
            for block in blocks:
                block.register_forward_pre_hook(lambda *_args: PretendCuda.crossings.clear())
                block.register_forward_hook(lambda *_args, inside=inside: inside.extend(PretendCuda.crossings))
            made.append(engine.denoise(prompt).latents)
            assert inside == []  # no layer makes the host wait
    assert_close(made[1], made[0])


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("mode", ["tiled", "auto"])  # auto is whole here
def test_decoding_with_a_trace_and_a_record(folders: dict[str, Path], name: str, mode: str) -> None:
    decode = TILES[name] if mode == "tiled" else DecodeConfig(mode=mode)
    trace = SpectralTrace()
    with pretend_cuda(), contextlib.closing(LongVideoEngine(config_of(folders[name], name, decode=decode))) as engine:
        result = engine.generate(PROMPT, trace=trace)
    assert result.frames.shape[0] == SIZES[name].num_frames
    assert result.record["decode"]["mode"] == ("whole" if mode == "auto" else mode)
    assert result.record["device"]["type"] == "cuda"
    assert {row["branch"] for row in trace.rows} == {"local", "global"}


def test_ltx_decodes_in_chunks(folders: dict[str, Path]) -> None:
    decode = DecodeConfig(mode="framewise", tile_frames=16, stride_frames=8)
    with pretend_cuda(), contextlib.closing(LongVideoEngine(config_of(folders["ltx"], "ltx", decode=decode))) as engine:
        assert engine.generate(PROMPT).frames.shape[0] == SIZES["ltx"].num_frames


@pytest.mark.parametrize("name", ADAPTERS)
def test_spectra_of_windows(folders: dict[str, Path], name: str) -> None:
    trace = WindowSpectra()
    with pretend_cuda(), contextlib.closing(LongVideoEngine(config_of(folders[name], name))) as engine:
        engine.denoise(PROMPT, trace=trace)
    assert {row["multiple"] for row in trace.rows} >= {1, 2}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_interrupted_run_continues(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pretend_cuda(), contextlib.closing(LongVideoEngine(config_of(folders[name], name))) as engine:
        whole = engine.denoise(PROMPT).latents
        stop_run(engine, path, after=1)
        denoised = engine.denoise(PROMPT, snapshot=path, snapshot_every=1)
    assert denoised.resumed_at == 1
    assert torch.equal(denoised.latents, whole)


@pytest.mark.parametrize("name", ADAPTERS)
def test_ctrl_c_stops_during_device_work(
    folders: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting is Python's, so that the signal of the third wait ends it, though the device would never be done."""
    path, waits, looks = tmp_path / "state.safetensors", [], []

    class Working(Event):
        def record(self, stream: Any = None) -> None:
            waits.append(self)

        def query(self) -> bool:
            if len(waits) < 3:
                return True
            looks.append(self)
            if len(looks) == 2:
                signal.raise_signal(signal.SIGINT)
            return False

    def synchronize(*_args: Any) -> None:
        raise AssertionError("this would wait in C")

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background is started with it ignored
    with pretend_cuda(), contextlib.closing(LongVideoEngine(config_of(folders[name], name))) as engine:
        whole = engine.denoise(PROMPT).latents
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "Event", Working)
            patch.setattr(torch.cuda, "synchronize", synchronize)
            with pytest.raises(KeyboardInterrupt):
                engine.denoise(PROMPT, snapshot=path)
        signal.signal(signal.SIGINT, before)
        denoised = engine.denoise(PROMPT, snapshot=path)
    assert (len(waits), len(looks)) == (3, 2)  # two for each step: before the scheduler's and after it
    assert denoised.resumed_at == 1
    assert torch.equal(denoised.latents, whole)


@pytest.mark.parametrize(
    ("method", "riflex"),
    [
        *((method, Riflex()) for method in ("direct", "sliding_window", "freenoise", "freelong", "freespec")),
        ("freespec", Riflex(enabled=True, index=1)),
    ],
)
def test_the_second_pass_is_queued_without_waiting_for_the_first(
    folders: dict[str, Path], method: str, riflex: Riflex
) -> None:
    """A number that goes from the device to the host, or back, waits for all that is queued before it."""
    crossings: list[list[str]] = []
    config = config_of(folders["wan"], "wan", attention=AttentionConfig(riflex=riflex))
    with pretend_cuda(), contextlib.closing(LongVideoEngine(config)) as engine:
        engine.use_method(MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step", fused_share=0.5)))
        transformer = engine.pipe.transformer
        transformer.register_forward_pre_hook(lambda *_args: PretendCuda.crossings.clear(), prepend=True)
        transformer.register_forward_hook(lambda *_args: crossings.append(list(PretendCuda.crossings)))
        engine.denoise(PROMPT)
        assert crossings[1::2] == [[]] * 2
        assert "tolist" in crossings[0]  # the timesteps, once a video
        assert not any({"tolist", "float"} & set(each) for each in crossings[1:])
        # The negative control: a timestep that is no view of the scheduler's must be read.
        hook = transformer.register_forward_pre_hook(
            lambda _module, args, inputs: (args, inputs | {"timestep": inputs["timestep"].clone()}),
            with_kwargs=True,
            prepend=True,
        )
        crossings.clear()
        engine.denoise(PROMPT)
        hook.remove()
        assert all("float" in each for each in crossings)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_text_encoder_may_stay_on_the_cpu_and_texts_be_kept(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    made = []
    with pretend_cuda():
        for text_device in ("model", "cpu"):
            config = config_of(folders[name], name, parallel=ParallelConfig(text_device=text_device))
            with contextlib.closing(LongVideoEngine(config)) as engine:
                assert engine.pipe.text_encoder.device.type == ("cpu" if text_device == "cpu" else "cuda")
                engine.text.keep(tmp_path)
                made += [engine.denoise(PROMPT).latents, engine.denoise(PROMPT).latents]
    assert torch.equal(made[0], made[1])  # found in the cache
    assert torch.equal(made[2], made[3])
    assert_close(made[2], made[0])


@pytest.mark.parametrize("name", ADAPTERS)
def test_parts_that_are_offloaded_meet_their_inputs(folders: dict[str, Path], name: str) -> None:
    model = ModelConfig(path=str(folders[name]), device="cuda", dtype="float32", weights="cpu_offload")
    with pretend_cuda():
        with contextlib.closing(LongVideoEngine(config_of(folders[name], name))) as engine:
            expected = engine.generate(PROMPT)
        with contextlib.closing(LongVideoEngine(config_of(folders[name], name, model=model))) as engine:
            for _ in range(2):  # the second video finds the parts where the first one left them
                result = engine.generate(PROMPT)
                assert torch.equal(result.latents, expected.latents)
                assert (result.frames == expected.frames).all()


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_kernel_is_measured_in_bf16(folders: dict[str, Path], name: str) -> None:
    model = ModelConfig(path=str(folders[name]), device="cuda")
    with pretend_cuda(), contextlib.closing(LongVideoEngine(config_of(folders[name], name, model=model))) as engine:
        assert engine.pipe.transformer.dtype == torch.bfloat16
        assert list(engine.kernel.seconds) == ["cuda_cudnn", "cuda_flash"]
        assert list(engine.kernel.left_out) == ["cuda_fa3"]
        assert torch.isfinite(engine.denoise(PROMPT).latents).all()


@pytest.mark.parametrize("name", ADAPTERS)
def test_latents_are_decoded_alone(folders: dict[str, Path], name: str) -> None:
    with pretend_cuda():
        config = config_of(folders[name], name)
        with contextlib.closing(LongVideoEngine(config)) as engine:
            latents = engine.denoise(PROMPT).latents
        with open_decoder(config) as decoder:
            frames = sum(len(part) for part in decoder.decode(latents))
    assert frames == SIZES[name].num_frames


@pytest.mark.parametrize(("name", "kind"), [("wan", WanPipeline), ("ltx", LTXPipeline)])
@pytest.mark.parametrize("method", ["direct", "freespec", "freepca"])
def test_a_pipeline_of_ones_own(folders: dict[str, Path], name: str, kind: Any, method: str) -> None:
    pipe = kind.from_pretrained(folders[name], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    video = SIZES[name]
    call = {"prompt": PROMPT, "height": video.height, "width": video.width, "num_frames": video.num_frames}
    call |= {"num_inference_steps": 3, "max_sequence_length": 20, "output_type": "latent"}

    def run() -> Tensor:
        with apply_method(pipe, method=method, window_frames=3):
            return pipe(**call, generator=torch.Generator().manual_seed(0)).frames.cpu()

    expected = run()
    with pretend_cuda():
        pipe.to("cuda")
        assert_close(run(), expected)


@pytest.mark.parametrize(("name", "kind"), [("wan", WanPipeline), ("ltx", LTXPipeline)])
@pytest.mark.parametrize("offloaded", ["before", "after"])
def test_an_offloaded_pipeline_of_ones_own(folders: dict[str, Path], name: str, kind: Any, offloaded: str) -> None:
    """Whole videos, with noise from the device's generator, before or after the method is put on."""
    video = SIZES[name]
    call = {"prompt": PROMPT, "height": video.height, "width": video.width, "num_frames": video.num_frames}
    call |= {"num_inference_steps": 2, "max_sequence_length": 20, "negative_prompt": "bad", "output_type": "np"}
    riflex = Riflex(enabled=True, index=1) if name == "wan" else None
    with pretend_cuda():
        pipe = kind.from_pretrained(folders[name], dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        if offloaded == "before":
            pipe.enable_model_cpu_offload(device="cuda")
        with apply_method(pipe, method="freespec", window_frames=3, riflex=riflex):
            if offloaded == "after":
                pipe.enable_model_cpu_offload(device="cuda")
            frames = pipe(**call, generator=torch.Generator("cuda").manual_seed(0)).frames
    assert frames.shape == (1, video.num_frames, video.height, video.width, 3)


@pytest.mark.parametrize("fault", ["refuses", "is wrong"])
def test_auto_on_a_pipeline_of_ones_own_is_tried_out_first(
    folders: dict[str, Path], fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's first choice, if it equals plain attention on strided windows; else the next one, and a line says so."""

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if fault == "refuses":
            raise RuntimeError("cuDNN Frontend error: no valid execution plans")
        return kernels.cuda_flash(q, k[:1].expand_as(k), v)

    video = SIZES["wan"]
    call = {"prompt": PROMPT, "height": video.height, "width": video.width, "num_frames": video.num_frames}
    call |= {"num_inference_steps": 2, "max_sequence_length": 20, "output_type": "latent"}

    def run(kernel: str, **changes: Any) -> Tensor:
        with apply_method(pipe, method="freespec", window_frames=3, kernel=kernel):
            return pipe(**call | changes, generator=torch.Generator().manual_seed(0)).frames.cpu()

    with pretend_cuda():
        pipe = WanPipeline.from_pretrained(folders["wan"], dtype=torch.bfloat16).to("cuda")
        pipe.set_progress_bar_config(disable=True)
        kernel_choice.fastest.cache_clear()
        right = run("auto")
        assert torch.equal(right, run("cuda_cudnn"))
        assert "attention kernel" not in capsys.readouterr().err
        monkeypatch.setitem(kernels.KERNELS, "cuda_cudnn", cudnn)
        kernel_choice.fastest.cache_clear()
        run("auto", num_frames=9)  # of native length: needs no kernel
        assert "attention kernel" not in capsys.readouterr().err
        assert torch.equal(run("auto"), run("cuda_flash"))
        [line] = [line for line in capsys.readouterr().err.splitlines() if "attention kernel" in line]
        assert "attention kernel cuda_flash, as others cannot be used here (cuda_cudnn: " in line
    kernel_choice.fastest.cache_clear()


def test_ctrl_c_stops_a_user_pipeline(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are looked at before and after each forward; the wait for them is Python's."""
    waits = []

    class Working(Event):
        def record(self, stream: Any = None) -> None:
            waits.append(self)

        def query(self) -> bool:
            if len(waits) == 2:
                raise KeyboardInterrupt
            return True

    video = SIZES["wan"]
    with pretend_cuda():
        pipe = WanPipeline.from_pretrained(folders["wan"], dtype=torch.float32).to("cuda")
        pipe.set_progress_bar_config(disable=True)
        monkeypatch.setattr(torch.cuda, "Event", Working)
        with apply_method(pipe, method="direct", window_frames=3), pytest.raises(KeyboardInterrupt):
            pipe(PROMPT, height=video.height, width=video.width, num_frames=29, num_inference_steps=2)
    assert len(waits) == 2


def test_tables_with_a_lower_frequency_and_other_methods(folders: dict[str, Path]) -> None:
    attention = AttentionConfig(kernel="plain", riflex=Riflex(enabled=True, index=1))
    made = []
    for device, context in (("cpu", contextlib.nullcontext()), ("cuda", pretend_cuda())):
        config = config_of(folders["wan"], "wan", device, attention=attention)
        with context, contextlib.closing(LongVideoEngine(config)) as engine:
            made.append(engine.denoise(PROMPT).latents)
            engine.use_method(MethodConfig(name="freespec.methods.low_rank:LowRank", window_frames=3))
            made.append(engine.denoise(PROMPT).latents)
    for actual, expected in zip(made[2:], made[:2], strict=True):
        assert_close(actual, expected)


def on_ranks(rank: int, case: tuple[str, Path, tuple[int, int, int]]) -> tuple[Tensor, int]:
    """Latents of this rank, traced and after an interruption, and the number of frames that it decoded in tiles with the others."""
    name, folder, (cfg, ring, ulysses) = case

    with pretend_cuda(nccl=True):
        device, timeout = torch.device("cuda"), PATIENCE
        mesh = build_mesh(cfg=cfg, ring=ring, ulysses=ulysses, device=device, timeout=timeout)
        with pytest.raises(MixedDevicesError, match="No backend type associated with device type cpu"):
            dispatch(torch.ops.c10d.allreduce_.default, ([torch.ones(1)], mesh.world.group), {})
        config = config_of(folder, name, decode=TILES[name])
        path = folder / f"state-{cfg}-{ring}-{ulysses}.safetensors"
        with contextlib.closing(LongVideoEngine(config, Ranks(mesh=mesh))) as engine:
            for trace in (SpectralTrace(), WindowSpectra()):
                latents = engine.denoise(PROMPT, trace=trace).latents
                assert trace.rows or cfg > 1  # of the ranks that run the pass with the prompt
            stop_run(engine, path, after=1)
            denoised = engine.denoise(PROMPT, snapshot=path)
            assert denoised.resumed_at == 1
            assert torch.equal(denoised.latents, latents)
            frames = sum(len(part) for part in engine.decode(latents))
        assert mesh.world.monitor is not None
        mesh.world.monitor.close()
    return latents, frames


def test_ranks_over_nccl_send_tensors_of_the_device(folders: dict[str, Path], tmp_path: Path) -> None:
    cases = [("wan", folders["wan"], each) for each in [(2, 1, 1), (1, 2, 1), (1, 1, 2)]]
    cases += [(name, folders[name], (1, 2, 1)) for name in ADAPTERS if name != "wan"]
    expected = {}
    for name in ADAPTERS:
        with contextlib.closing(LongVideoEngine(config_of(folders[name], name, "cpu"))) as engine:
            expected[name] = engine.denoise(PROMPT).latents
    for (name, *_), by_rank in zip(cases, run_ranks(2, on_ranks, cases, tmp_path), strict=True):
        for rank, (latents, frames) in enumerate(by_rank):
            assert torch.equal(latents, by_rank[0][0])
            assert_close(latents, expected[name])
            assert frames == (SIZES[name].num_frames if rank == 0 else 0)


FUSED_THROUGHOUT = FreeSpec(domain="step", fused_share=1.0)


def with_a_solver_that_fails(rank: int, case: tuple[Path, tuple[int, int, int]]) -> tuple[str, bool]:
    """The error of this rank, when rank 1's eigensolver is wrong in the second step; and whether it warned."""
    folder, (cfg, ring, ulysses) = case
    config, finished = config_of(folder, "wan"), []
    config = dataclasses.replace(config, method=MethodConfig(window_frames=3, freespec=FUSED_THROUGHOUT))

    def solve(matrices: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors * (2 if rank == 1 and finished else 1)

    with pretend_cuda(), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setitem(eigen.SOLVERS, "torch", solve)
        device, timeout = torch.device("cuda"), PATIENCE
        mesh = build_mesh(cfg=cfg, ring=ring, ulysses=ulysses, device=device, timeout=timeout)
        with contextlib.closing(LongVideoEngine(config, Ranks(mesh=mesh))) as engine:
            try:
                engine.denoise(PROMPT, on_step=lambda *_steps: finished.append(True))
            except UserError as error:
                return str(error), any("eigensolver torch on" in str(each.message) for each in warned)
    return "", False


def test_a_solver_that_fails_on_one_rank_ends_all(folders: dict[str, Path], tmp_path: Path) -> None:
    cases = [(folders["wan"], each) for each in [(1, 1, 2), (1, 2, 1), (2, 1, 1)]]
    for by_rank in run_ranks(2, with_a_solver_that_fails, cases, tmp_path):
        [error] = {error for error, _ in by_rank}
        assert re.fullmatch(
            r"step 2 of 2 failed: rank 1: eigensolver torch on .* are off by .*; use another version .*", error
        )
        assert [warned for _, warned in by_rank] == [False, True]
