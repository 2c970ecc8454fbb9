"""Prompts against a tokenizer: as the pipeline reads them, and before weights are read."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from engine.adapters import LTX, WAN
from engine.config import ModelConfig, SamplerConfig, VideoConfig
from engine.errors import UserError
from engine.load.pipeline import load_tokenizer
from engine.text.prompts import check_prompts, count_tokens, refuse_long_prompts
from tests.tiny_pipelines import random_wan, save_random_wan

TINY = {"wan": ModelConfig(path="tiny/wan"), "ltx": ModelConfig(path="tiny/ltx")}
SAMPLER = SamplerConfig(max_text_tokens=32)
VIDEO = VideoConfig(num_frames=33, height=32, width=32)
KNOWN = "a red circle bounces over a blue background"


@pytest.mark.parametrize("family", TINY)
def test_unknown_words_are_named_once_with_where_they_are_and_where_the_list_is(family: str) -> None:
    prompts = [
        ("line 1 of a.txt", KNOWN),
        ("line 2 of a.txt", "a dragon, flies over a castle."),
        ("line 4 of a.txt", "the dragon turns left"),
    ]
    [note] = check_prompts(TINY[family], SAMPLER, VIDEO, prompts)
    assert note.startswith(
        '3 words are unknown to the model and ignored: "dragon" (line 2 of a.txt), "flies" (line 2 of a.txt), '
        '"castle" (line 2 of a.txt); known words are listed in '
    )
    card = Path(note.rpartition("listed in ")[2])
    assert card.name == "README.md"
    assert "`bounces`" in card.read_text()
    assert check_prompts(TINY[family], SAMPLER, VIDEO, prompts[:1]) == []


def test_many_unknown_words_are_one_sentence() -> None:
    words = [f"word{number}" for number in range(25)]
    [note] = check_prompts(
        TINY["wan"], dataclasses.replace(SAMPLER, max_text_tokens=512), VIDEO, [("the prompt", " ".join(words))]
    )
    assert note.startswith("25 words are unknown")
    assert '"word9" (the prompt) and 15 more;' in note
    assert "word10" not in note
    [note] = check_prompts(TINY["wan"], SAMPLER, VIDEO, [("the prompt", "日" * 100)])
    assert f'"{"日" * 40}" (the prompt);' in note


def test_a_negative_prompt_is_looked_at_where_it_is_read() -> None:
    sampler = dataclasses.replace(SAMPLER, negative_prompt="blurred")
    [note] = check_prompts(TINY["wan"], sampler, VIDEO, [("the prompt", KNOWN)])
    assert note.startswith('1 word is unknown to the model and ignored: "blurred" (the negative prompt);')
    [note] = check_prompts(
        TINY["wan"], dataclasses.replace(sampler, guidance_scale=1.0), VIDEO, [("the prompt", KNOWN)]
    )
    assert note == ("sampler.negative_prompt is not used: with sampler.guidance_scale 1 there is no unconditional pass")
    assert (
        check_prompts(TINY["wan"], dataclasses.replace(SAMPLER, guidance_scale=1.0), VIDEO, [("the prompt", KNOWN)])
        == []
    )


@pytest.mark.parametrize("family", TINY)
def test_transformers_warns_of_no_long_prompt(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line speaks of the tokenizer's own length; `sampler.max_text_tokens` is the bound."""
    warned = mock.Mock()
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", warned)
    checkpoint, tokenizer = load_tokenizer(TINY[family])
    tokenizer.model_max_length = 4
    refuse_long_prompts(checkpoint.adapter, tokenizer, [("the prompt", KNOWN)], 32)
    warned.assert_not_called()
    assert len(tokenizer(KNOWN).input_ids) > 4
    warned.assert_called_once()  # negative control


def test_every_prompt_that_is_too_long_is_named() -> None:
    long = " ".join(["circle"] * 40)
    prompts = [("line 1 of a.txt", KNOWN), ("line 2 of a.txt", long), ("line 5 of a.txt", f"{long} {long}")]
    with pytest.raises(UserError) as caught:
        check_prompts(TINY["wan"], dataclasses.replace(SAMPLER, negative_prompt=long), VIDEO, prompts)
    assert str(caught.value) == (
        "3 prompts have more tokens than sampler.max_text_tokens, which is 32: line 2 of a.txt (41), line 5 of a.txt (81), the "
        "negative prompt (41); shorten them or raise the setting"
    )
    unread = dataclasses.replace(SAMPLER, negative_prompt=long, guidance_scale=0.0)
    assert len(check_prompts(TINY["wan"], unread, VIDEO, prompts[:1])) == 1
    with pytest.raises(
        UserError, match=r"^the negative prompt has 41 tokens, and sampler.max_text_tokens is 32; shorten"
    ):
        check_prompts(TINY["wan"], dataclasses.replace(SAMPLER, negative_prompt=long), VIDEO, prompts[:1])


def test_tokens_are_those_that_the_pipeline_sees() -> None:
    """WanPipeline resolves HTML escapes and joins spaces before it counts; LTXPipeline does not."""
    pipe = random_wan()
    for text in ("a  b", "a &lt;&amp;amp; b", "a b" * 7, "", "x \u2028 y"):
        seen = 0

        def count(encoder: Any, args: tuple[Any, ...]) -> None:
            nonlocal seen
            seen = int(args[1].sum())  # the attention mask

        hook = pipe.text_encoder.register_forward_pre_hook(count)
        pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=64, device="cpu")
        hook.remove()
        assert count_tokens(WAN, pipe.tokenizer, text) == seen, text
    assert count_tokens(LTX, pipe.tokenizer, "a &lt; b") > count_tokens(WAN, pipe.tokenizer, "a &lt; b")
    exact = count_tokens(WAN, pipe.tokenizer, "a red circle")
    refuse_long_prompts(WAN, pipe.tokenizer, [("the prompt", "a red circle")], exact)
    with pytest.raises(UserError, match=f"the prompt has {exact} tokens"):
        refuse_long_prompts(WAN, pipe.tokenizer, [("the prompt", "a red circle")], exact - 1)


def test_a_checkpoint_without_words_is_refused_before_its_weights(tmp_path: Path) -> None:
    folder = save_random_wan(tmp_path / "wan")
    with mock.patch("engine.load.pipeline.check_part", side_effect=AssertionError("weights were looked at")):
        assert load_tokenizer(ModelConfig(path=str(folder)))[1].unk_token == "<unk>"
        (folder / "tokenizer/tokenizer.json").unlink()
        with pytest.raises(
            UserError, match=r"tokenizer has no tokenizer\.json or spiece\.model; fetch the checkpoint again"
        ):
            load_tokenizer(ModelConfig(path=str(folder)))


def test_a_timeline_is_read_by_its_texts() -> None:
    sampler = dataclasses.replace(SAMPLER, negative_prompt="blurred [0-1s] | a circle [1s-]")
    prompts = [("line 1 of a.txt", KNOWN.replace("red", "crimson") + f" [0-1s] | {KNOWN} [1s-]")]
    [note] = check_prompts(TINY["wan"], sampler, VIDEO, prompts)
    assert note.startswith(
        '2 words are unknown to the model and ignored: "crimson" (event 1 of line 1 of a.txt), "blurred" (the '
        "negative prompt); "
    )
    long = " ".join(["circle"] * 40)
    with pytest.raises(
        UserError, match=r"^event 2 of the prompt has 41 tokens, and sampler.max_text_tokens is 32; shorten"
    ):
        check_prompts(TINY["wan"], SAMPLER, VIDEO, [("the prompt", f"{KNOWN} [0-1s] | {long} [1s-]")])


def test_a_timeline_that_does_not_fit_the_video_is_refused_by_name() -> None:
    late = f"{KNOWN} [0-8s] | {KNOWN} [8s-]"
    with pytest.raises(
        UserError, match=r"^line 4 of a.txt: event 1 .* exceeds the video, which ends at 2.0625 seconds"
    ):
        check_prompts(TINY["wan"], SAMPLER, VIDEO, [("line 4 of a.txt", late)])
    with pytest.raises(UserError, match=r"^event 1 .* exceeds the video"):
        check_prompts(TINY["wan"], SAMPLER, VIDEO, [("the prompt", late)])
