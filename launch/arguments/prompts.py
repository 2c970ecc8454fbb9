"""The prompts of a command: `--prompt`, `--timeline`, or the lines of `--prompts`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jsonargparse import ArgumentParser, Namespace

from engine.config import RunConfig
from engine.errors import UserError
from engine.paths import find_file
from engine.shown import quoted
from engine.text.prompt_files import NEGATIVE_SETTING, read_prompt_lines
from engine.text.timeline import read_timeline
from launch.arguments.options import add_prompts_file
from launch.process.argv import option_value

# The default prompt.
EXAMPLE = "a red circle bounces over a blue background"


def add_prompts(parser: ArgumentParser) -> None:
    """Add `--prompt`, `--timeline` and `--prompts`."""
    parser.add_argument("--prompt", type=str, help="prompt of the video")
    parser.add_argument(
        "--timeline",
        type=str,
        help="prompt that changes over time: 'TEXT [0-4s] | TEXT [4s-]', or a YAML file, instead of --prompt",
    )
    add_prompts_file(parser, ", instead of --prompt")


def add_num_prompts(parser: ArgumentParser) -> None:
    """Add `--num_prompts`."""
    parser.add_argument("--num_prompts", type=int, help="use only the first N prompts (default: all)")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts in order, with their names in messages.

    Attributes:
        texts: the prompts; a timeline is one of them.
        names: such as "the prompt", "line 3 of prompts.txt".
        negative_prompt: negative prompt of a timeline whose events have negative texts, else None.
    """

    texts: list[str]
    names: list[str]
    negative_prompt: str | None = None

    @property
    def named(self) -> list[tuple[str, str]]:
        """(name, text) of each."""
        return list(zip(self.names, self.texts, strict=True))

    def first(self, count: int | None) -> "Prompts":
        """Return the first `count` prompts, or all if None."""
        return replace(self, texts=self.texts[:count], names=self.names[:count])

    def refuse_duplicates(self) -> None:
        """Raise UserError for duplicates, which would count twice."""
        first: dict[str, str] = {}
        for name, text in self.named:
            if text in first:
                raise UserError(
                    f"a prompt appears twice ({first[text]} and {name}) and would count as two: {quoted(text)}; leave one out"
                )
            first[text] = name

    def directed(self, config: RunConfig, argv: Sequence[str]) -> RunConfig:
        """Set the timeline's negative prompt in a configuration; UserError if the command line gives another."""
        if self.negative_prompt is None:
            return config
        if option_value(argv, f"--{NEGATIVE_SETTING}") is not None:
            raise UserError(
                f"the events of --timeline have negative texts; leave out --{NEGATIVE_SETTING} or those texts"
            )
        return replace(config, sampler=replace(config.sampler, negative_prompt=self.negative_prompt))


def read_prompts(
    prompt: str | None, file: str | None, flag: str = "--prompts", *, timeline: str | None = None
) -> Prompts:
    """Read the prompt, the timeline, or the non-blank lines of the file that the option `flag` names."""
    if (prompt, file, timeline).count(None) != 2:
        raise UserError("give one of --prompt TEXT, --timeline EVENTS and --prompts FILE")
    if timeline is not None:
        text, negative_prompt = read_timeline(timeline)
        return Prompts(texts=[text], names=["the prompt"], negative_prompt=negative_prompt)
    if file is None:
        assert prompt is not None
        if not prompt.strip():
            raise UserError("--prompt is empty")
        return Prompts(texts=[prompt], names=["the prompt"])
    path = find_file(file)
    lines = read_prompt_lines(path, flag)
    return Prompts(texts=[text for _, text in lines], names=[f"line {number} of {path.name}" for number, _ in lines])


def choose_prompts(namespace: Namespace) -> Prompts:
    """Read the first `--num_prompts` prompts; UserError for duplicates."""
    prompts = read_prompts(namespace.prompt, namespace.prompts, timeline=namespace.timeline)
    prompts.refuse_duplicates()
    count = namespace.num_prompts
    if count is not None and not 1 <= count <= len(prompts.texts):
        raise UserError(f"--num_prompts must lie in [1, {len(prompts.texts)}], the number of prompts, got {count}")
    return prompts.first(count)
