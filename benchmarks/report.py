"""Write the tables of docs/performance.md (expected and measured), docs/predictions.md, docs/long-videos.md, docs/far-keys.md,
docs/caches.md and docs/memory.md.

python -m benchmarks.report

Only the tables are generated, each between `<!-- table NAME -->` and `<!-- end NAME -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import gpu_report, predicted, tables
from benchmarks.measure import RESULTS, ROOT
from benchmarks.published import published_table
from benchmarks.tables import NOT_MEASURED, Run, table, verdict
from engine.files.tables import emptier

PAGES = tuple(
    ROOT / "docs" / f"{name}.md"
    for name in ("performance", "predictions", "long-videos", "far-keys", "caches", "memory")
)
BENCHMARKS: dict[str, Callable[[Run], str]] = {
    "attention": tables.attention,
    "caches": tables.caches,
    "far": tables.far,
    "far_latents": tables.far_latents,
    "fusion": tables.fusion,
    "parallel": tables.parallel,
    "memory": tables.memory,
    "minutes": tables.minutes,
    "long_measures": tables.long_measures,
    "peaked": tables.peaked,
    "timeline": tables.timeline,
}
MEASURED = tuple(name for name in BENCHMARKS if name != "timeline")
CLOCKS = ("wall_s", "cpu_s")
BY_SHAPE = ("attention", "far", "fusion")  # one result for each shape
_SPAN = re.compile(r"(<!-- table (\w+) -->\n).*?(\n<!-- end \2 -->)", re.DOTALL)

# Goals: benchmark, shapes (the first that was measured counts), ratio, largest value.
EXPECTED = [
    ("attention", ("wan", "wan-short"), "dual / global", 1.3),
    ("attention", ("wan", "wan-short"), "dual / two calls", 1.0),
    ("far", ("wan", "wan-short"), "dual, 1/8 / global", 0.45),
    ("fusion", ("wan", "wan-short"), "fusion / SVD in fp32", 0.2),
    *(
        ("timeline", (model,), f"{how} / plain", 1.05)
        for model in ("tiny-wan", "tiny-ltx")
        for how in ("cut", "scene", "fade", "relay")
    ),
]


def latest() -> dict[str, Run]:
    """The newest file of each CPU benchmark, by the date in its name.

    Shapes that only older files have measured stay, as runs of their own in `older`.
    """
    runs: dict[str, Run] = {}
    files = [path for name in BENCHMARKS for path in RESULTS.glob(f"{name}-cpu-*.json")]
    for path in sorted(files, key=lambda path: path.stem[-10:]):
        run = json.loads(path.read_text()) | {"file": path.name}
        name = run["benchmark"]
        before = [runs[name], *runs[name]["older"]] if name in runs else []
        runs[name] = run | {"older": _not_in(run["results"], before) if name in BY_SHAPE else []}
    return runs


def _not_in(results: list[dict[str, Any]], runs: list[Run]) -> list[Run]:
    shapes, kept = {result["shape"] for result in results}, []
    for run in runs:
        rest = [result for result in run["results"] if result["shape"] not in shapes]
        shapes |= {result["shape"] for result in rest}
        kept += [run | {"results": rest}] if rest else []
    return kept


def expectations(runs: Mapping[str, Run]) -> str:
    """Goals, and whether they hold."""
    rows = []
    for benchmark, shapes, name, limit in EXPECTED:
        newest = runs.get(benchmark)
        every = [newest, *newest["older"]] if newest else []
        by_shape = {result["shape"]: result for run in every for result in run["results"]}
        found = [by_shape[shape] for shape in shapes if shape in by_shape and name in by_shape[shape]["ratios"]]
        cells = [NOT_MEASURED, ""]
        if found:
            value = found[0]["ratios"][name]
            cells = [*tables.ratios(found[0], [name]), clocks_agree(*(value[unit]["median"] for unit in CLOCKS), limit)]
        where = f"CPU, {found[0]['shape'] if found else shapes[0]}"
        rows.append([name, where, f"<= {limit}", *cells])
    shown = table(["ratio", "where", "expected", "time (CPU time)", "holds"], rows)
    return f"{shown}\n\n{tables.provenance(runs['timeline'])}" if "timeline" in runs else shown


def clocks_agree(wall: float, cpu: float, limit: float) -> str:
    """Both clocks must agree; where only one is within the limit, the page says which."""
    if (wall <= limit) == (cpu <= limit):
        return verdict(wall <= limit)
    return "in CPU time only" if cpu <= limit else "in time only"


def measured(runs: Mapping[str, Run], benchmark: str) -> str:
    """The tables of one benchmark, with where they were measured."""
    if benchmark not in runs:
        return f"{NOT_MEASURED.capitalize()}."
    newest = runs[benchmark]
    every = [newest, *newest["older"]]
    return "\n\n".join(f"{BENCHMARKS[benchmark](run)}\n\n{tables.provenance(run)}" for run in every)


def page_tables() -> dict[str, str]:
    """Every table of the pages by name."""
    runs, gpu = latest(), gpu_report.read()
    goals = [*gpu_report.goals(gpu, predicted.predicted_ratios()), *predicted.eight_gpus()]
    return {
        "goals": table(["what", "goal", "predicted", "measured", "holds", "file"], goals),
        "expected": expectations(runs),
        **{name: measured(runs, name) for name in MEASURED},
        "gpu": "\n\n".join(gpu_report.sections(gpu)),
        "predicted": predicted.predictions(),
        "predicted_long": predicted.long_videos(),
        "predicted_pair": predicted.pair_memory(),
        "published": published_table(),
    }


def fill(texts: Sequence[str], found: Mapping[str, str]) -> list[str]:
    """Insert the tables into the pages; ValueError unless each table has one place."""
    places = [name for text in texts for _, name, _ in _SPAN.findall(text)]
    if sorted(places) != sorted(found):
        raise ValueError(f"the pages have places for {sorted(places)}, and the tables are {sorted(found)}")
    return [_SPAN.sub(lambda match: f"{match[1]}{found[match[2]]}{match[3]}", text) for text in texts]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pages; a page loses tables only with `--overwrite`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("--overwrite", action="store_true", help="replace a page even if it has more tables")
    options = parser.parse_args(argv)
    before = [page.read_text(encoding="utf-8") for page in PAGES]
    after = fill(before, page_tables())
    for page, old, new in zip(PAGES, before, after, strict=True):
        lost = [] if options.overwrite else emptier(old, new)
        if lost:
            sys.exit(
                f"error: {page} has more tables than {RESULTS} holds ({'; '.join(lost)}) and stays as it is; add --overwrite to replace it"
            )
    for page, new in zip(PAGES, after, strict=True):
        page.write_text(new, encoding="utf-8")
        print(f"wrote {page}")


if __name__ == "__main__":
    main()
