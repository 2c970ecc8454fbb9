"""Command line of evaluate.py."""

from jsonargparse import ArgumentParser, Namespace

from engine.errors import UserError
from engine.paths import expand
from evaluation.vbench.dimensions import DIMENSIONS, parse_dimensions
from launch.arguments.options import add_out, add_workers, check_workers
from launch.cli.parser import Keys, add_former_name, arrange, make_parser, parse

USAGE = "--runs FOLDER[,FOLDER...] [--vbench CHECKOUT --python PYTHON] [--SETTING VALUE ...]"
DESCRIPTION = (
    "Score the finished videos of a batch and write report.md, report.csv and report.json. With --vbench and --python, "
    "VBench-Long scores them in its own environment (docs/vbench.md); without, weight-free proxies are reported, and "
    "exact measures of videos of the embedded world."
)


def read(argv: list[str]) -> Namespace:
    """Parse and check; UserError for a mistake."""
    parser = make_parser("evaluate.py", USAGE, DESCRIPTION)
    add_arguments(parser)
    options = parse(parser, arrange(argv, Keys.of(parser)))
    if bool(options.runs) == bool(options.videos):
        raise UserError("give either --runs FOLDER, the --out of launch/batch.py, or --videos LIST.csv")
    if bool(options.vbench) != bool(options.python):
        given, missing = ("vbench", "python") if options.vbench else ("python", "vbench")
        raise UserError(f"--{given} needs --{missing}: VBench-Long is run by its own environment, see docs/vbench.md")
    if not options.vbench and not options.proxies:
        raise UserError("nothing to do: give --vbench and --python, or leave --proxies on")
    if options.native_frames is not None and options.native_frames < 1:
        raise UserError(f"--native_frames must be 1 or more, got {options.native_frames}")
    if "," in options.runs and not options.out:
        raise UserError("--runs names several folders: give --out, the folder of the report")
    check_workers(options.workers)
    if options.time_limit <= 0:
        raise UserError(f"--time_limit must be above 0, got {options.time_limit:g}")
    parse_dimensions(options.dimensions)
    if options.vbench:
        read_gpus(options)
    check_places(options)
    return options


def read_gpus(options: Namespace) -> list[str]:
    """Parse `--gpus`; UserError unless they are distinct numbers and fit `--device`."""
    if options.device not in ("cuda", "cpu"):
        raise UserError(f"--device must be cuda or cpu, got {options.device!r}")
    gpus = [word.strip() for word in options.gpus.split(",") if word.strip()]
    if not all(word.isdecimal() for word in gpus) or len(set(gpus)) < len(gpus):
        raise UserError(f"--gpus must be different numbers with commas, such as 0,1, got {options.gpus!r}")
    if gpus and options.device == "cpu":
        raise UserError("--gpus selects GPUs, but --device is cpu; leave one of them out")
    return gpus


def check_places(options: Namespace) -> None:
    """Raise UserError for a folder of `--runs` or a file of `--videos` that does not exist."""
    for name in ("runs", "videos"):
        for place in options[name].split(",") if name == "runs" else [options[name]]:
            try:
                if not place.strip() or (expand(place.strip()).is_dir() if name == "runs" else expand(place).exists()):
                    continue
            except OSError as error:
                raise UserError(f"cannot look into --{name} {place}: {error.strerror}") from error
            if name == "runs":
                raise UserError(f"--runs {place.strip()} is not a folder; give the --out of launch/batch.py")
            raise UserError(f"cannot read --videos {place}: No such file or directory")


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--runs", type=str, default="", help="output folders of launch/batch.py, with commas")
    parser.add_argument("--videos", type=str, default="", help="instead: CSV with the columns method,prompt,seed,path")
    add_out(parser, "the report (default: `evaluation` in --runs)", default="")
    parser.add_argument("--vbench", type=str, default="", help="folder of a VBench checkout")
    parser.add_argument("--python", type=str, default="", help="Python of the environment that VBench runs in")
    parser.add_argument("--weights", type=str, default="~", help="folder that VBench uses as HOME, with .cache in it")
    parser.add_argument("--dimensions", type=str, default=",".join(DIMENSIONS), help="dimensions, with commas")
    parser.add_argument("--device", type=str, default="cuda", help="cuda or cpu, for VBench")
    parser.add_argument(
        "--gpus", type=str, default="", help="GPUs to use, such as 0,1,2; each scores one dimension at a time"
    )
    parser.add_argument("--time_limit", type=float, default=21600.0, help="time limit of one VBench process in seconds")
    parser.add_argument("--baseline", type=str, default="", help="baseline method of differences (default: direct)")
    parser.add_argument("--proxies", type=bool, default=True, help="compute the weight-free measures")
    add_workers(parser)
    add_former_name(parser, "nproc", "workers", int)
    parser.add_argument(
        "--native_frames",
        type=int,
        default=None,
        help="native length of the model in frames, for exact measures of videos whose sidecar lacks it",
    )
    parser.add_argument("--keep_views", type=bool, default=False, help="keep the staged videos and clips")
    parser.add_argument("--check", type=bool, default=False, help="only check that all required files exist")
