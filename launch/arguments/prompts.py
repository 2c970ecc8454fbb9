"""The prompts of a command: `--prompt`, or the lines of `--prompt_file`."""

from jsonargparse import ArgumentParser, Namespace

from engine.errors import UserError
from engine.paths import expand


def add_prompts(parser: ArgumentParser) -> None:
    """The options that give prompts."""
    parser.add_argument("--prompt", type=str, help="what the video shows")
    parser.add_argument("--prompt_file", type=str, help="text file with one prompt a line, instead of --prompt")


def add_num_prompts(parser: ArgumentParser) -> None:
    """The option that takes the first prompts only."""
    parser.add_argument(
        "--num_prompts", type=int, help="how many of its prompts are used, the first ones (default: all)"
    )


def read_prompts(prompt: str | None, prompt_file: str | None) -> list[str]:
    """The prompt, or every line of the file that is not blank."""
    if (prompt is None) == (prompt_file is None):
        raise UserError("give one of --prompt TEXT and --prompt_file FILE")
    if prompt_file is None:
        if not prompt.strip():
            raise UserError("--prompt is empty")
        return [prompt]
    try:
        lines = expand(prompt_file).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read --prompt_file {prompt_file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file {prompt_file} is not UTF-8 text (byte {error.start})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompt_file {prompt_file} has no prompt; write one a line")
    return prompts


def choose_prompts(namespace: Namespace) -> list[str]:
    """The first `--num_prompts` prompts; UserError for one that is there twice, which would count as two."""
    prompts = read_prompts(namespace.prompt, namespace.prompt_file)
    twice = next((prompt for index, prompt in enumerate(prompts) if prompt in prompts[:index]), None)
    if twice is not None:
        raise UserError(f"a prompt is there twice, and would count as two: {twice!r}; leave one out")
    count = namespace.num_prompts
    if count is not None and not 1 <= count <= len(prompts):
        raise UserError(f"--num_prompts must lie in [1, {len(prompts)}], the number of prompts, got {count}")
    return prompts[:count]
