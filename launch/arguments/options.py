"""Options that several commands have: one name, one help text, and the former names, which work for one release more."""

from jsonargparse import ArgumentParser

from engine.errors import UserError
from launch.cli.parser import add_former_name


def add_prompts_file(
    parser: ArgumentParser, of: str = "", *, name: str = "prompts", default: str | None = None
) -> None:
    """Add `--prompts FILE`, and its former name `--prompt_file`; `of` ends its help."""
    parser.add_argument(f"--{name}", type=str, default=default, help=f"text file with one prompt a line{of}")
    add_former_name(parser, f"{name.removesuffix('s')}_file", name)


def add_methods(parser: ArgumentParser, of: str = "", *, default: str | None = None) -> None:
    """Add `--methods`; `of` ends its help."""
    text = "comma-separated: METHOD, or METHOD:PRESET.yaml with its settings, or NAME=METHOD:PRESET.yaml"
    parser.add_argument("--methods", type=str, default=default, help=text + of)


def add_seeds(parser: ArgumentParser, of: str = "(default: sampler.seed)", *, name: str = "seeds") -> None:
    """Add `--seeds 0,1`, and its former name `--num_seeds 2`: two seeds from sampler.seed on; `of` ends its help."""
    parser.add_argument(f"--{name}", type=str, help=f"comma-separated whole numbers {of}")
    add_former_name(
        parser, f"num_{name}", name, int, convert=lambda count, given: seeds_from(given.sampler.seed, count)
    )


def seeds_from(first: int, count: int) -> str:
    """`count` comma-separated seeds, starting at `first`; UserError if there are none."""
    if count < 1:
        raise UserError(f"give the seeds themselves, at least one, such as --seeds {first}; got {count}")
    return ",".join(str(first + number) for number in range(count))


def add_out(parser: ArgumentParser, of: str, *, default: str | None = None) -> None:
    """Add `--out FOLDER`."""
    parser.add_argument("--out", type=str, default=default, help=f"folder of {of}")


def add_nproc(parser: ArgumentParser) -> None:
    """Add `--nproc`."""
    text = "ranks that share a video, one per GPU, on this machine or in each replica; torchrun starts its own"
    parser.add_argument("--nproc", type=int, help=text)


def add_workers(parser: ArgumentParser) -> None:
    """Add `--workers`."""
    parser.add_argument("--workers", type=int, default=1, help="number of processes that measure videos, on CPUs")


def check_workers(number: int) -> None:
    """Raise UserError for a `--workers` below 1."""
    if number < 1:
        raise UserError(f"--workers must be 1 or more, got {number}")
