"""A timeline on stock pipelines: equal to them where it must be, to every frame attending to every text where it differs."""

import itertools
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from engine import apply_method
from engine.adapters import adapter_of
from engine.adapters.base import join_texts
from engine.errors import UserError
from engine.hooks.cross_attention import apply_timeline
from engine.hooks.self_attention import BranchProcessor
from freespec.events import Event
from freespec.timeline import timeline_ref
from tests.loras import random_lora, save_lora
from tests.tiny_pipelines import random_ltx, random_wan

CALL = {"num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 20}
# 29 frames of Wan at 4 frames a latent frame are 8 latent frames; 57 of LTX-Video at 8 are 8 as well.
SIZES = {
    "wan": {"height": 32, "width": 48, "num_frames": 29},
    "ltx": {"height": 64, "width": 96, "num_frames": 57},
}
MAKE = {"wan": random_wan, "ltx": random_ltx}
STEP = {"wan": 4, "ltx": 8}
FPS = {"wan": 4, "ltx": 8}  # a latent frame is a second
PROMPT = "a red circle"
TWO = "a red circle [0-3s] | a gold star [3s-{how}]"


def latents_of(pipe, family: str, **text) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    call = CALL | SIZES[family] | text
    return pipe(**call, generator=generator, output_type="latent").frames


def plain(pipe, family: str, prompt: str = PROMPT) -> Tensor:
    return latents_of(pipe, family, prompt=prompt, negative_prompt="bad")


def timed(pipe, family: str, timeline: str, negative_prompt: str = "bad") -> Tensor:
    with apply_timeline(
        pipe, timeline, fps=FPS[family], negative_prompt=negative_prompt, max_sequence_length=20
    ) as handle:
        return latents_of(pipe, family, **handle.inputs)


@pytest.mark.parametrize("family", MAKE)
def test_one_text_of_the_whole_length_is_the_plain_prompt_bit_for_bit(family):
    pipe = MAKE[family]()
    expected = plain(pipe, family)
    assert torch.equal(timed(pipe, family, f"{PROMPT} [0-]"), expected)
    assert torch.equal(timed(pipe, family, f"{PROMPT} [0-3s] | {PROMPT} [3s-, cut]"), expected)


@pytest.mark.parametrize("family", MAKE)
def test_a_lora_of_peft_counts_under_a_timeline(family, tmp_path):
    """Put on after the timeline, not fused: its layers are called, also those of the cross-attention."""
    pipe = MAKE[family]()
    layers = {name: pair for name, pair in random_lora(pipe.transformer).items() if ".attn2." in name}
    file = save_lora(tmp_path / "a.safetensors", layers)
    without = plain(pipe, family)
    with apply_timeline(
        pipe, f"{PROMPT} [0-]", fps=FPS[family], negative_prompt="bad", max_sequence_length=20
    ) as handle:
        pipe.load_lora_weights(file)
        made = latents_of(pipe, family, **handle.inputs)
    assert torch.equal(made, plain(pipe, family))
    assert not torch.equal(made, without)


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("how", ["fade 2s", "relay 1s"])
def test_one_text_twice_with_a_transition_is_the_plain_prompt_up_to_rounding(family, how):
    pipe = MAKE[family]()
    expected = plain(pipe, family)
    out = timed(pipe, family, f"{PROMPT} [0-3s] | {PROMPT} [3s-, {how}]")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    other = timed(pipe, family, TWO.format(how=f", {how}"))
    assert (other - expected).norm() > 1e-2 * expected.norm()  # negative control: the second text counts


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("method", [None, "direct", "freespec"])
def test_remove_restores_the_pipeline_bit_for_bit(family, method):
    pipe = MAKE[family]()
    before, expected = dict(pipe.transformer.attn_processors), plain(pipe, family)
    if method is not None:
        handle = apply_method(pipe, method=method, window_frames=3)
    with_method = plain(pipe, family)
    changed = timed(pipe, family, TWO.format(how=", cut"))
    assert not torch.equal(changed, with_method)
    assert torch.equal(plain(pipe, family), with_method)
    if method is not None:
        handle.remove()
    assert pipe.transformer.attn_processors == before
    assert torch.equal(plain(pipe, family), expected)


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("first", ["method", "timeline"])
def test_windows_end_where_a_scene_does(family, first):
    """Of a video of windows alone nothing of the first scene is in the second; the global branch is in both."""
    pipe = MAKE[family]()

    def last_frames(text: str, how: str, method: str) -> Tensor:
        line = f"{text} [0-3s] | a gold star [3s-, {how}]"
        with ExitStack() as stack:
            on = [
                lambda: stack.enter_context(apply_method(pipe, method=method, window_frames=3)),
                lambda: stack.enter_context(apply_timeline(pipe, line, fps=FPS[family], max_sequence_length=20)),
            ]
            method_handle, timeline = [make() for make in on] if first == "method" else [on[1](), on[0]()][::-1]
            latents = latents_of(pipe, family, **timeline.inputs)
            assert method_handle.state.scenes == ((4,) if how == "scene" else ())
            timeline.remove()
            assert method_handle.state.scenes == ()
        return latents.unflatten(1, (8, -1))[:, 4:] if family == "ltx" else latents[:, :, 4:]

    for method, how, same in (
        ("sliding_window", "scene", True),
        ("sliding_window", "cut", False),
        ("freespec", "scene", False),
    ):
        one, other = (last_frames(text, how, method) for text in ("a red circle", "a blue square"))
        assert torch.equal(one, other) == same, (method, how)
    whole = [last_frames("a red circle", how, "direct") for how in ("scene", "cut")]
    assert torch.equal(*whole)


class _EveryText:
    """The reference as a processor: all texts for all frames, in fp64, with the stock module's own projections."""

    def __init__(self, adapter, events: list[Event], frame_tokens: int) -> None:
        self.adapter, self.events, self.frame_tokens = adapter, events, frame_tokens

    def __call__(self, attn: nn.Module, hidden: Tensor, text: Tensor, mask: Tensor | None = None, *_) -> Tensor:
        q, k, v = self.adapter.cross_qkv(attn, hidden, text)
        rows = []
        for item in range(len(q)):
            texts = []
            for index, (ks, vs) in enumerate(zip(*(x[item].chunk(len(self.events)) for x in (k, v)), strict=True)):
                words = slice(None)
                if mask is not None:
                    words = mask[item, 0].chunk(len(self.events))[index] > -1.0
                texts.append((ks[None, words], vs[None, words]))
            rows.append(timeline_ref(q[item : item + 1], texts, self.events, frame_tokens=self.frame_tokens))
        return self.adapter.project_out(attn, torch.cat(rows).to(hidden.dtype))


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize(
    ("how", "event"),
    [
        ("cut", Event(start=4, stop=8)),
        ("fade 2s", Event(start=4, stop=8, transition="fade", width=2.0)),
        ("relay 0.5s", Event(start=4, stop=8, transition="relay", width=0.5)),
    ],
)
@pytest.mark.parametrize("method", ["direct", "freespec"])
def test_a_run_equals_one_in_which_every_frame_attends_to_every_text(family, how, event, method):
    pipe = MAKE[family]().to(torch.float64)
    adapter = adapter_of(pipe)
    events = [Event(start=0, stop=4), event]
    with apply_method(pipe, method=method, window_frames=3):
        ours = timed(pipe, family, TWO.format(how=f", {how}"))
        texts = adapter.encode_text(pipe, ["a red circle", "a gold star", "bad"], 20, torch.device("cpu"))
        inputs = dict(zip(adapter.text_arguments, join_texts(texts[:2]), strict=True))
        negative = dict(zip(adapter.text_arguments, join_texts([texts[2]] * 2), strict=True))
        inputs |= {f"negative_{name}": tensor for name, tensor in negative.items()}

        def reference(events: list[Event]) -> Tensor:
            for attn in adapter.cross_attention_modules(pipe.transformer):
                attn.set_processor(_EveryText(adapter, events, frame_tokens=4 * 6))
            return latents_of(pipe, family, **inputs)

        theirs = reference(events)
        moved = reference(
            [Event(start=0, stop=5), Event(start=5, stop=8, transition=event.transition, width=event.width)]
        )
    assert (ours - theirs).norm() < 1e-7 * theirs.norm()
    assert (ours - moved).norm() > 1e-4 * theirs.norm()  # negative control: the boundary one frame later


@pytest.mark.parametrize("family", MAKE)
def test_negative_texts_may_be_of_each_event(family):
    pipe = MAKE[family]()
    line = TWO.format(how=", cut")
    same = timed(pipe, family, line, "bad [0-3s] | bad [3s-]")
    assert torch.equal(same, timed(pipe, family, line))
    assert not torch.equal(timed(pipe, family, line, "bad [0-3s] | worse [3s-]"), same)
    with pytest.raises(UserError, match="other ranges"):
        timed(pipe, family, line, "bad [0-4s] | worse [4s-]")


@pytest.mark.parametrize("family", MAKE)
def test_a_plain_call_of_a_pipeline_with_a_timeline_is_refused(family):
    pipe = MAKE[family]()
    for line in (
        "a [0-2s] | b [2s-5s] | c [5s-]",
        "a [0-2s] | b [2s-]",
    ):  # 20 is a multiple of two texts, and not theirs
        with apply_timeline(pipe, line, fps=FPS[family], max_sequence_length=20):
            with pytest.raises(
                UserError,
                match=r"timeline of . texts and was called with 20 text tokens; call it with \*\*handle.inputs",
            ):
                plain(pipe, family)


def test_a_second_timeline_is_refused():
    pipe = random_wan()
    with apply_timeline(pipe, "a [0-]", fps=4, max_sequence_length=20):
        with pytest.raises(UserError, match="already has a timeline"):
            apply_timeline(pipe, "b [0-]", fps=4, max_sequence_length=20)


def test_a_timeline_that_does_not_fit_the_video_is_refused_when_the_pipeline_is_called():
    pipe = random_wan()
    with pytest.raises(UserError, match=r"exceeds the video, which ends at 7\.25 seconds"):
        timed(pipe, "wan", "a [0-8s] | b [8s-]")


@pytest.mark.parametrize("order", list(itertools.permutations(["method", "timeline"])))
def test_method_and_timeline_go_on_and_off_in_any_order(order):
    pipe = random_wan()
    before = dict(pipe.transformer.attn_processors)
    make = {
        "method": lambda: apply_method(pipe, method="freespec", window_frames=3),
        "timeline": lambda: apply_timeline(pipe, TWO.format(how=", fade 1s"), fps=4, max_sequence_length=20),
    }
    handles = {name: make[name]() for name in order}
    first = latents_of(pipe, "wan", **handles["timeline"].inputs)
    kinds = {type(attn.processor) for attn in adapter_of(pipe).attention_modules(pipe.transformer)}
    assert kinds == {BranchProcessor}
    for name in order:
        handles[name].remove()
    assert pipe.transformer.attn_processors == before
    handles = {name: make[name]() for name in reversed(order)}
    assert torch.equal(latents_of(pipe, "wan", **handles["timeline"].inputs), first)
    for handle in handles.values():
        handle.remove()
