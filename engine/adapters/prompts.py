"""What every family asks of a prompt before it is encoded."""

from collections.abc import Sequence
from typing import Any

from engine.errors import UserError


def refuse_long_prompts(tokenizer: Any, prompts: Sequence[str], max_tokens: int) -> None:
    """Raise UserError for a prompt of more than `max_tokens` tokens: its end would be cut off without a word."""
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > max_tokens:
            raise UserError(
                f"a prompt has {length} tokens, and sampler.max_text_tokens is {max_tokens}; shorten it or raise the "
                f"setting: {prompt[:60]!r}"
            )
