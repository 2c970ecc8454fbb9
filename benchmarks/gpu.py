"""All GPU benchmarks in one command of less than nine minutes, without a network.

python -m benchmarks.gpu --out benchmarks/results/gpu
python -m benchmarks.gpu --small --out /tmp/small    # the same code in tiny sizes, on a CPU

Each section is a process with a time limit, and writes OUT/SECTION.json after every figure: a failure or a timeout costs only the rest of
that section. Within a section what compiles for the device or needs another package (Triton, FlexAttention, xfuser) comes last.
Weights are random, of the published configurations.
"""

import argparse
import importlib
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from benchmarks.sections.bench import Bench, clocks
from benchmarks.tables import table

# Sections in order, and their guaranteed seconds, to which unused seconds of earlier ones are added; with the grace of each they fit into
# MINUTES. Later sections read the results of `layer`.
SECTIONS = {
    "correctness": 45.0,
    "layer": 115.0,
    "steps": 165.0,
    "ranks": 35.0,
    "decode": 30.0,
    "trace": 25.0,
    "compiled": 50.0,
    "optional": 25.0,
}
GRACE = 5.0  # seconds from a section's deadline, which it observes itself, until it is killed
MINUTES = 8.9


def main() -> None:
    """Run the sections and print their status; the exit status is 1 if any was not finished."""
    args = parse()
    if args.small:  # sections are forked, with the imports done
        torch.set_num_threads(1)
        for name in SECTIONS:
            importlib.import_module(f"benchmarks.sections.{name}")
    end = time.monotonic() + 60 * args.minutes
    rows = []
    for name in args.sections:
        limit = limit_of(name, args.sections, end - time.monotonic())
        started = time.monotonic()
        rows.append([name, *run_section(name, args, limit), f"{time.monotonic() - started:.1f}"])
        print(f"{name}: {rows[-1][1]}, {rows[-1][-1]} s", flush=True)
    print(table(["section", "status", "what happened", "seconds"], rows))
    sys.exit(any(row[1] != "done" for row in rows))


def limit_of(name: str, sections: Sequence[str], left: float) -> float:
    """Seconds that a section may take of those left: all but the guaranteed ones of later sections."""
    later = sections[sections.index(name) + 1 :]
    return left - GRACE - sum(SECTIONS[other] + GRACE for other in later)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files and the trace")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all sections together")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --small runs the same code in tiny sizes on a CPU")
    return args


def run_section(name: str, args: argparse.Namespace, limit: float) -> tuple[str, str]:
    """Run a section in a process and return its status and a line of reason; spawned for CUDA, which does not survive a fork.

    An earlier run's file of the section is removed in any case: the page shows one run.
    """
    bench = Bench(
        section=name,
        device=torch.device("cpu" if args.small else "cuda"),
        small=args.small,
        out=args.out,
        deadline=time.monotonic() + limit,
    )
    (bench.out / f"{name}.json").unlink(missing_ok=True)
    if limit <= 0:
        return "not started", "the time is up"
    process: BaseProcess = multiprocessing.get_context("fork" if args.small else "spawn").Process(
        target=in_process, args=(bench,)
    )
    process.start()
    process.join(limit + GRACE)
    if process.is_alive():
        process.kill()
        process.join()
        amend(bench, "timeout", f"ended after {limit + GRACE:.0f} s; the figures before that are kept")
    elif process.exitcode != 0:
        amend(bench, "failed", f"the process ended with status {process.exitcode}")
    content = json.loads((bench.out / f"{name}.json").read_text())
    return content["status"], content.get("error", "")


def in_process(bench: Bench) -> None:
    """Run one section; an exception is written to its file, with its traceback to stderr."""
    started = time.perf_counter()
    try:
        bench.start()
        importlib.import_module(f"benchmarks.sections.{bench.section}").run(bench)
    except BaseException as error:
        line = next(iter(str(error).strip().splitlines()), "")
        bench.about["clocks_after"] = clocks()
        bench.write("failed", error=f"{type(error).__name__}: {line}"[:300], seconds=time.perf_counter() - started)
        traceback.print_exc()
        raise SystemExit(1) from error
    bench.about["clocks_after"] = clocks()
    bench.write("done", seconds=time.perf_counter() - started)


def amend(bench: Bench, status: str, reason: str) -> None:
    """Set the status of a file that its process could not finish; a status that it wrote itself stays."""
    path = bench.out / f"{bench.section}.json"
    if not path.exists():
        bench.write(status, error=reason)
        return
    content = json.loads(path.read_text())
    if content["status"] == "running":
        path.write_text(json.dumps(content | {"status": status, "error": reason}, indent=1) + "\n")


if __name__ == "__main__":
    main()
