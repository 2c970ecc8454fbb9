"""Check prompts with a checkpoint's tokenizer, before weights are read: their length, and unknown words."""

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.adapters import ModelAdapter
from engine.config import ModelConfig, SamplerConfig, VideoConfig
from engine.errors import UserError
from engine.load.checkpoint import Checkpoint
from engine.load.pipeline import load_tokenizer
from engine.paths import SHIPPED
from engine.shown import quoted
from engine.text.timeline import Direction, read_direction

# A prompt's name in messages ("the prompt", "line 3 of prompts.txt"), and its text.
Named = tuple[str, str]
PROMPT = "the prompt"
NEGATIVE = "the negative prompt"

_SHOWN_WORDS = 10
_SHOWN_LETTERS = 40


def check_prompts(
    model: ModelConfig, sampler: SamplerConfig, video: VideoConfig, prompts: Sequence[Named]
) -> list[str]:
    """`check_read_prompts` with the tokenizer of a checkpoint, of which nothing else is read."""
    return check_read_prompts(*load_tokenizer(model), sampler, video, prompts)


def check_read_prompts(
    checkpoint: Checkpoint, tokenizer: Any, sampler: SamplerConfig, video: VideoConfig, prompts: Sequence[Named]
) -> list[str]:
    """Check all prompts of a run; returns notes for the user, one sentence each.

    Args:
        checkpoint: the checkpoint.
        tokenizer: its tokenizer.
        sampler: the longest prompt, the negative prompt, and whether there is guidance.
        video: length and rate, which the events of a timeline must fit.
        prompts: (name, text) of each.

    Raises:
        UserError: prompts are longer than `sampler.max_text_tokens`; all of them are named. Or a timeline does not fit the video,
            or there is no tokenizer.
    """
    adapter, spec = checkpoint.adapter, checkpoint.spec
    guided = sampler.guidance_scale > 1.0

    def texts(prompt: Named) -> dict[str, list[Named]]:
        name, text = prompt
        try:
            direction = read_direction(
                text,
                sampler.negative_prompt,
                num_frames=video.num_frames,
                fps=video.fps,
                step=spec.token_step,
            )
        except UserError as error:
            raise error if name == PROMPT else UserError(f"{name}: {error}") from error
        return texts_by_pass(prompt, sampler.negative_prompt, direction, guided=guided)

    passes = [texts(prompt) for prompt in prompts]
    read = [named for each in passes for named in each["cond"]]
    read += dict.fromkeys(named for each in passes for named in each.get("uncond", []))
    refuse_long_prompts(adapter, tokenizer, read, sampler.max_text_tokens)
    notes = []
    if sampler.negative_prompt and not guided:
        notes.append(
            f"sampler.negative_prompt is not used: with sampler.guidance_scale {sampler.guidance_scale:g} there is no unconditional pass"
        )
    unknown = unknown_words(adapter, tokenizer, read)
    return [*notes, describe_unknown(unknown, checkpoint.folder)] if unknown else notes


def texts_by_pass(
    prompt: Named, negative_prompt: str, direction: Direction | None, *, guided: bool
) -> dict[str, list[Named]]:
    """The texts of the pass `cond` and, with guidance, of `uncond`: one, or one for each event."""
    if direction is None:
        passes = {"cond": [prompt], "uncond": [(NEGATIVE, negative_prompt)]}
    else:
        named = [(f"event {index} of {prompt[0]}", text) for index, text in enumerate(direction.texts, start=1)]
        passes = {"cond": named, "uncond": [(NEGATIVE, text) for text in direction.negatives]}
    return passes if guided else {"cond": passes["cond"]}


def refuse_long_prompts(adapter: ModelAdapter, tokenizer: Any, prompts: Sequence[Named], max_tokens: int) -> None:
    """Raise UserError if prompts have more than `max_tokens` tokens, since their ends would be cut off silently."""
    counts = [(name, text, count_tokens(adapter, tokenizer, text)) for name, text in prompts]
    too_long = [each for each in counts if each[2] > max_tokens]
    if not too_long:
        return
    if len(too_long) == 1:
        [(name, text, count)] = too_long
        raise UserError(
            f"{name} has {count} tokens, and sampler.max_text_tokens is {max_tokens}; shorten it or raise the setting: {quoted(text[:60])}"
        )
    named = ", ".join(f"{name} ({count})" for name, _, count in too_long)
    raise UserError(
        f"{len(too_long)} prompts have more tokens than sampler.max_text_tokens, which is {max_tokens}: {named}; shorten them or "
        "raise the setting"
    )


def count_tokens(adapter: ModelAdapter, tokenizer: Any, text: str) -> int:
    """Tokens of a prompt as the pipeline reads it, including the end token."""
    return len(_token_ids(tokenizer, adapter.clean_prompt(text)))


def _token_ids(tokenizer: Any, text: str, **settings: Any) -> list[int]:
    """Token numbers, without transformers' warning of errors for a text beyond the tokenizer's length, which is no bound here."""
    return tokenizer(text, verbose=False, **settings).input_ids


def unknown_words(adapter: ModelAdapter, tokenizer: Any, prompts: Sequence[Named]) -> dict[str, str]:
    """Words that the tokenizer does not know, in order, each with the name of the first prompt that has it."""
    unknown = tokenizer.unk_token_id
    found: dict[str, str] = {}
    for name, text in prompts:
        clean = adapter.clean_prompt(text)
        if unknown is None or unknown not in _token_ids(tokenizer, clean):
            continue
        for word in clean.split():
            if unknown in _token_ids(tokenizer, word, add_special_tokens=False):
                found.setdefault(word.strip(string.punctuation) or word, name)
    return found


def describe_unknown(words: dict[str, str], folder: Path) -> str:
    """One sentence that names unknown words, and where the known ones are listed."""
    shown = [f"{quoted(word[:_SHOWN_LETTERS])} ({name})" for word, name in list(words.items())[:_SHOWN_WORDS]]
    more = f" and {len(words) - len(shown)} more" if len(words) > len(shown) else ""
    card = folder / "README.md"
    embedded = folder.resolve().parent == SHIPPED / "tiny"
    where = card if embedded and card.is_file() else folder / "tokenizer"
    return (
        f"{len(words)} {'word is' if len(words) == 1 else 'words are'} unknown to the model and ignored: "
        f"{', '.join(shown)}{more}; known words are listed in {where}"
    )
