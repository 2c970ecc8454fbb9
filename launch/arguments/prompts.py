"""The prompts of a command: `--prompt`, or the lines of `--prompt_file`."""

from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace

from engine.errors import UserError
from engine.paths import expand
from engine.prompt_files import read_prompt_lines

# What the embedded model shows where nobody says what.
EXAMPLE = "a red circle bounces over a blue background"


def add_prompts(parser: ArgumentParser) -> None:
    """The options that give prompts."""
    parser.add_argument("--prompt", type=str, help="what the video shows")
    parser.add_argument("--prompt_file", type=str, help="text file with one prompt a line, instead of --prompt")


def add_num_prompts(parser: ArgumentParser) -> None:
    """The option that takes the first prompts only."""
    parser.add_argument(
        "--num_prompts", type=int, help="how many of its prompts are used, the first ones (default: all)"
    )


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts in order, and what messages call each of them."""

    texts: list[str]
    names: list[str]

    @property
    def named(self) -> list[tuple[str, str]]:
        """(name, text) of each."""
        return list(zip(self.names, self.texts, strict=True))

    def first(self, count: int | None) -> "Prompts":
        """So many of them; all if None."""
        return Prompts(texts=self.texts[:count], names=self.names[:count])


def read_prompts(prompt: str | None, prompt_file: str | None, flag: str = "--prompt_file") -> Prompts:
    """The prompt, or every line of the file that is not blank; `flag` is the option that names the file."""
    if (prompt is None) == (prompt_file is None):
        raise UserError("give one of --prompt TEXT and --prompt_file FILE")
    if prompt_file is None:
        if not prompt.strip():
            raise UserError("--prompt is empty")
        return Prompts(texts=[prompt], names=["the prompt"])
    path = expand(prompt_file)
    lines = read_prompt_lines(path, flag)
    return Prompts(texts=[text for _, text in lines], names=[f"line {number} of {path.name}" for number, _ in lines])


def choose_prompts(namespace: Namespace) -> Prompts:
    """The first `--num_prompts` prompts; UserError for one that is there twice, which would count as two."""
    prompts = read_prompts(namespace.prompt, namespace.prompt_file)
    first: dict[str, str] = {}
    for name, text in prompts.named:
        if text in first:
            raise UserError(
                f"a prompt is there twice ({first[text]} and {name}), and would count as two: {text!r}; leave one out"
            )
        first[text] = name
    count = namespace.num_prompts
    if count is not None and not 1 <= count <= len(prompts.texts):
        raise UserError(f"--num_prompts must lie in [1, {len(prompts.texts)}], the number of prompts, got {count}")
    return prompts.first(count)
