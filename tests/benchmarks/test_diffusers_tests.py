"""The command for diffusers' tests: methods on every pipeline, counted, and videos compared with those of stock pipelines."""

import pytest
from transformers import AutoConfig, AutoTokenizer, T5EncoderModel

from benchmarks.diffusers_tests import T5, MethodOnPipelines, local_t5, main
from engine.hooks.self_attention import BranchProcessor
from tests.tiny_pipelines import random_ltx, random_wan, random_wan22

VIDEO = {"num_frames": 9, "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def seen():
    """`direct`, removed in the end from all pipelines: with it goes the process group."""
    pipelines = MethodOnPipelines("direct")
    yield pipelines
    pipelines.release()


def test_every_pipeline_gets_the_method_and_its_attentions_are_counted(monkeypatch, seen):
    seen.install(monkeypatch)
    for pipe, layers in ((random_wan(), 2), (random_ltx(), 2)):
        before = seen.attentions
        pipe("a", negative_prompt="b", **VIDEO | {"height": 32, "width": 32}, guidance_scale=2.0)
        assert seen.attentions - before >= layers  # Wan calls its transformer twice, LTX-Video once with two in a batch
    assert (seen.applied, seen.calls, len(seen.videos), seen.refused) == (2, 2, 2, {})

    again = type(pipe)(**pipe.components)
    again("a", **VIDEO | {"height": 32, "width": 32})  # took the method over with the transformer
    assert (seen.applied, seen.calls) == (3, 3)
    seen.release()
    pipe("a", **VIDEO | {"height": 32, "width": 32})
    assert (seen.calls, len(seen.videos)) == (3, 4)


def test_pipelines_that_stay_stock_are_listed(monkeypatch, seen):
    pipe = random_wan22()
    seen.install(monkeypatch)
    type(pipe)(**pipe.components | {"transformer": None, "transformer_2": None})  # for prompts only
    type(pipe)(**pipe.components | {"transformer_2": None}, boundary_ratio=0.875)
    assert seen.applied == 0
    encoder, half = seen.refused
    assert encoder.startswith("the WanPipeline has no transformer")
    assert half.startswith("this checkpoint has boundary_ratio 0.875 and no transformer_2")


def test_a_call_around_the_method_fails(monkeypatch, seen):
    attend = BranchProcessor.__call__
    seen.install(monkeypatch)
    pipe = random_wan()
    monkeypatch.setattr(BranchProcessor, "__call__", attend)
    with pytest.raises(AssertionError, match="no self-attention of the call went through direct"):
        pipe("a", **VIDEO)


def test_a_method_keeps_every_test_and_video_or_is_told(monkeypatch, tmp_path, capsys):
    (tmp_path / "test_one.py").write_text(
        f"""
import pytest
import torch
from tests.tiny_pipelines import random_wan

class TestWan:
    def test_video(self):
        random_wan()("a", generator=torch.Generator().manual_seed(0), **{VIDEO | {"num_frames": 33}})

    def test_without_a_video(self):
        pass

    def test_that_fails(self):
        raise ValueError

    def test_that_is_skipped(self):
        pytest.skip()
"""
    )
    monkeypatch.setattr("benchmarks.diffusers_tests.in_new_process", lambda run, *args, **kwargs: run(*args, **kwargs))
    assert main([str(tmp_path)]) == 0
    row = f"| {tmp_path.name}/test_one.py::TestWan | 2 | {{}} | 1 | 1 | {{}} |"
    printed = capsys.readouterr().out
    assert row.format(2, 1) in printed
    assert "direct: 1 calls and 8 self-attentions of 1 pipelines" in printed

    assert main([str(tmp_path), "--method", "sliding_window", "--window_frames", "2"]) == 1
    printed = capsys.readouterr().out
    assert "AssertionError: 1 of 1 videos differ from those of stock pipelines" in printed
    assert row.format(1, 0) in printed
    assert f"passed with stock pipelines alone: {tmp_path.name}/test_one.py::TestWan::test_video" in printed

    assert main([f"{tmp_path}/test_one.py::TestWan::test_without_a_video"]) == 1  # no call went through the method


def test_the_dummy_encoder_is_made_here():
    with local_t5():
        assert AutoConfig.from_pretrained(T5).d_model == 32
        assert AutoTokenizer.from_pretrained(T5)("ab").input_ids[-1] == 1
        assert T5EncoderModel.from_pretrained(T5).config.vocab_size == 1103
