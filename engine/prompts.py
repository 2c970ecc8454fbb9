"""Prompts held against a checkpoint's tokenizer, before its weights are read: their length, words that it does not know."""

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.adapters import ModelAdapter
from engine.config import ModelConfig, SamplerConfig
from engine.errors import UserError
from engine.load import load_tokenizer
from engine.paths import REPOSITORY

# A prompt, and what messages call it: "the prompt", "line 3 of prompts.txt".
Named = tuple[str, str]
NEGATIVE = "the negative prompt"

_SHOWN_WORDS = 10
_SHOWN_LETTERS = 40


def check_prompts(model: ModelConfig, sampler: SamplerConfig, prompts: Sequence[Named]) -> list[str]:
    """Look at all prompts of a run; returns what a person should know before it starts, a sentence each.

    Args:
        model: the checkpoint, of which only the tokenizer is read.
        sampler: the longest prompt, the negative prompt, and whether there is guidance.
        prompts: (name, text) of each.

    Raises:
        UserError: prompts are longer than `sampler.max_text_tokens`; all of them are named. Or there is no tokenizer.
    """
    adapter, folder, tokenizer = load_tokenizer(model)
    guided = sampler.guidance_scale > 1.0
    read = [*prompts, (NEGATIVE, sampler.negative_prompt)] if guided else list(prompts)
    refuse_long_prompts(adapter, tokenizer, read, sampler.max_text_tokens)
    notes = []
    if sampler.negative_prompt and not guided:
        notes.append(
            f"sampler.negative_prompt is not read: with sampler.guidance_scale {sampler.guidance_scale:g} there is no unconditional pass"
        )
    unknown = unknown_words(adapter, tokenizer, read)
    return [*notes, describe_unknown(unknown, folder)] if unknown else notes


def refuse_long_prompts(adapter: ModelAdapter, tokenizer: Any, prompts: Sequence[Named], max_tokens: int) -> None:
    """Raise UserError if prompts have more than `max_tokens` tokens: their ends would be cut off without a word."""
    counts = [(name, text, count_tokens(adapter, tokenizer, text)) for name, text in prompts]
    too_long = [each for each in counts if each[2] > max_tokens]
    if not too_long:
        return
    if len(too_long) == 1:
        [(name, text, count)] = too_long
        raise UserError(
            f"{name} has {count} tokens, and sampler.max_text_tokens is {max_tokens}; shorten it or raise the setting: {text[:60]!r}"
        )
    named = ", ".join(f"{name} ({count})" for name, _, count in too_long)
    raise UserError(
        f"{len(too_long)} prompts have more tokens than sampler.max_text_tokens, which is {max_tokens}: {named}; shorten them or "
        "raise the setting"
    )


def count_tokens(adapter: ModelAdapter, tokenizer: Any, text: str) -> int:
    """Tokens of a prompt as the pipeline reads it, the end token among them."""
    return len(tokenizer(adapter.clean_prompt(text)).input_ids)


def unknown_words(adapter: ModelAdapter, tokenizer: Any, prompts: Sequence[Named]) -> dict[str, str]:
    """Words for which the tokenizer has no pieces, in order, each with the name of the first prompt that has it."""
    unknown = tokenizer.unk_token_id
    found: dict[str, str] = {}
    for name, text in prompts:
        clean = adapter.clean_prompt(text)
        if unknown is None or unknown not in tokenizer(clean).input_ids:
            continue
        for word in clean.split():
            if unknown in tokenizer(word, add_special_tokens=False).input_ids:
                found.setdefault(word.strip(string.punctuation) or word, name)
    return found


def describe_unknown(words: dict[str, str], folder: Path) -> str:
    """One sentence: which words the model does not know, and where those that it knows are listed."""
    shown = [f"{word[:_SHOWN_LETTERS]!r} ({name})" for word, name in list(words.items())[:_SHOWN_WORDS]]
    more = f" and {len(words) - len(shown)} more" if len(words) > len(shown) else ""
    card = folder / "README.md"
    embedded = folder.resolve().parent == REPOSITORY / "tiny"
    where = card if embedded and card.is_file() else folder / "tokenizer"
    return (
        f"{len(words)} {'word is' if len(words) == 1 else 'words are'} unknown to the model, which reads past them: "
        f"{', '.join(shown)}{more}; the words that it knows are listed in {where}"
    )
