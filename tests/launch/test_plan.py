"""`launch/plan.py` as a person and as a program uses it: no weights, no network, one line for a mistake."""

import json
from functools import partial
from typing import Any

import pytest

from launch.cli.start import run_here
from launch.process.exit_codes import run_command

WAN = ["--config", "configs/wan2.1-t2v-1.3b.yaml"]
run_plan = partial(run_command, partial(run_here, "plan"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the planner asked the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


def test_text_names_the_chosen_plan_first_and_says_why_and_that_times_are_predicted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_plan([*WAN, "--gpus", "8", "--gpu", "h200"]) == 0
    out = capsys.readouterr().out
    assert "chosen: cfg 2 x ring 1 x ulysses 4" in out
    assert "why: least predicted time for freespec" in out
    assert "numbers of the model: published numbers" in out or "local copy" in out
    assert "Every time is predicted" in out
    rows = [line.split()[:3] for line in out.partition("every plan")[2].splitlines()]
    assert rows[2] == ["2", "1", "4"]
    assert ["1", "1", "8"] in rows


def test_far_keys_are_shown_and_halve_the_time_of_freespec(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan([*WAN, "--gpus", "1", "--gpu", "h200", "--attention.far", "1/8"]) == 0
    out = capsys.readouterr().out
    assert "far keys of dual steps: 195 of 1560 tokens of each frame" in out
    assert run_plan([*WAN, "--gpus", "1", "--gpu", "h200", "--attention.far", "1/8", "--json"]) == 0
    [only] = json.loads(capsys.readouterr().out)["plans"]
    assert 0.45 < only["run_seconds"]["freespec"] / only["run_seconds"]["direct"] < 0.55


def test_json_is_the_same_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan([*WAN, "--gpus", "2", "--gpu", "a100", "--json", "--method.name", "direct"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["gpus"] == 2
    assert {"predicted", "model", "gpu", "video", "plans"} <= set(tree)
    first = tree["plans"][0]
    assert first["cfg"] * first["ring"] * first["ulysses"] == 2
    assert set(first["run_seconds"]) == {
        "direct",
        "sliding_window",
        "freenoise",
        "freelong",
        "freepca",
        "lvsa",
        "freespec",
    }
    assert set(first["bytes_per_step"]["dual"]) == {
        "all_to_all",
        "halo",
        "ring",
        "far",
        "grams",
        "gather",
        "cfg",
        "weights",
    }


def test_sharded_weights_are_shown_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WAN, "--gpus", "8", "--gpu", "rtx4090", "--model.path", "Wan-AI/Wan2.1-T2V-14B-Diffusers"]
    assert run_plan([*words, "--model.weights", "zero3"]) == 0
    out = capsys.readouterr().out
    assert "weights: zero3, a share of 1/8 on each GPU" in out
    assert "weights 3." in out  # 26.6 GiB of the transformer over eight, and the VAE
    assert ", weights " in out.partition("sends, MB")[2].partition("\n")[0]
    assert run_plan([*words, "--model.weights", "zero3", "--model.shards", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "a share of 1/8 of each GPU on the CPU" in out
    assert "what reading the shares from cpu takes is not predicted" in out
    assert run_plan(words) == 2
    assert "the smallest change that fits is model.weights zero3" in capsys.readouterr().err


def test_what_the_model_s_positions_cannot_do_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan(["--config", "configs/ltx-video-2b.yaml", "--attention.riflex.enabled", "true"]) == 2
    assert capsys.readouterr().err.startswith("error: attention.riflex does nothing for LTX-Video")


def test_only_what_the_provider_can_have_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for provider, uneven in (("torch", True), ("deepspeed", False)):
        assert run_plan([*WAN, "--gpus", "8", "--json", "--parallel.provider", provider]) == 0
        plans = json.loads(capsys.readouterr().out)["plans"]
        assert any(len({*p["heads"]}) > 1 for p in plans) is uneven


def test_a_single_file_of_the_hub_is_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WAN, "--model.single_file", "someone/something/wan.safetensors"]
    assert run_plan(words) == 0
    assert run_plan([*words, "--model.offline"]) == 2
    assert "it is not in the hub's local copy" in capsys.readouterr().err


def test_a_thousand_gpus_are_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    """In seconds: rank by rank it would take more than an hour, which is longer than a test may."""
    assert run_plan([*WAN, "--gpus", "1024"]) == 0
    assert "on 1024 x H200" in capsys.readouterr().out


def test_degrees_of_the_configuration_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan([*WAN, "--gpus", "8", "--parallel.cfg", "1", "--parallel.ring", "2"]) == 0
    assert "chosen: cfg 1 x ring 2 x ulysses 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h20"], "error: unknown GPU 'h20'; choose one of a100, h100, h200, rtx4070, rtx4090"),
        (["--nproc", "2"], "error: unknown setting nproc; did you mean --gpus 2?"),
        (["--prompt", "x"], "error: unknown setting prompt; this command does not use it; leave it out"),
        (["--gpus", "0"], "error: cannot plan for 0 GPUs; give 1 to 1024"),
        (["--gpus", "100000"], "error: cannot plan for 100000 GPUs; give 1 to 1024"),
        (["--video.num_frames", "320"], "error: video.num_frames must be 4k + 1, got 320"),
        (["--parallel.ulysses", "5"], "error: 1 rank cannot be arranged with ulysses 5; possible are 1 x 1 x 1 "),
        (["--gpu", "rtx4090", "--model.path", "Wan-AI/Wan2.1-T2V-14B-Diffusers"], "error: does not fit: cfg 1"),
        (["--gpu", "rtx4070"], "error: does not fit: cfg 1 x ring 1 x ulysses 1 needs 20.9 GiB on one RTX4070, where"),
        # What generate.py would refuse, and so is not planned.
        (
            ["--decode.mode", "framewise"],
            "error: decode.mode framewise is for decoders that take the whole video at once",
        ),
        (
            ["--decode.tile_height", "250"],
            "error: decode.tile_height must be a multiple of the 8 pixels of a latent, got 250",
        ),
        (
            ["--model.single_file", "nosuch.safetensors"],
            "error: model.single_file 'nosuch.safetensors' is neither a file here",
        ),
        (["--model.single_file", "a/b/c.ckpt"], "error: model.single_file a/b/c.ckpt is a pickle"),
        (["--parallel.provider", "deepspeed"], "error: parallel.provider deepspeed is for several ranks; give --gpus"),
        (
            ["--gpus", "7", "--parallel.provider", "deepspeed"],
            "error: parallel.provider deepspeed: DeepSpeed's all-to-all takes even shares only, and 126360 tokens over 7 ranks are not",
        ),
        (
            ["--gpus", "8", "--parallel.provider", "deepspeed", "--parallel.ulysses", "8"],
            "error: parallel.provider deepspeed: DeepSpeed's all-to-all takes even shares only, and 12 heads over 8 ranks are not",
        ),
        (
            ["--gpus", "4", "--attention.kernel", "plain"],
            "error: no time can be predicted: attention_fraction of H200 has no",
        ),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert run_plan([*WAN, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
