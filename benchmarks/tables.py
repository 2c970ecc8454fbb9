"""Markdown of what was measured: printed when a CPU benchmark ends, and written into docs/performance.md."""

import statistics
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]
NOT_MEASURED = "not measured"
PEAKS = ("global", "dual", "masked")
PARTS = ("grams", "eigh", "apply")  # of a fusion


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(holds: bool) -> str:
    """Whether something holds."""
    return "yes" if holds else "**no**"


def milliseconds(seconds: float) -> str:
    """Three digits, and no exponent."""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def layer(result: dict[str, Any]) -> list[str]:
    """Which layer was measured, as cells of a row."""
    return [result["shape"], result["sizes"], f"{result['heads']} x {result['head_dim']}"]


def ratios(result: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Ratios of times, and of CPU times in parentheses."""
    found = [result["ratios"].get(name) for name in names]
    return [f"{each['wall_s']['median']:.3g} ({each['cpu_s']['median']:.3g})" if each else "" for each in found]


def attention(run: Run) -> str:
    """Every shape of the attention benchmark in a row."""
    names = ["local / global", "dual / global", "dual / two calls"]
    rows = []
    for result in run["results"]:
        variants = result["variants"]
        peaks = " / ".join(f"{variants[name]['peak_extra_mib']:.0f}" for name in PEAKS)
        error = max(variants["dual"]["error"].values())
        rows.append([*layer(result), *ratios(result, names), peaks, f"{error:.1e}"])
    header = ["layer", "frames x tokens", "heads x D", *names, f"MiB beyond q, k, v: {' / '.join(PEAKS)}"]
    return table([*header, "error of dual against fp64"], rows)


def far(run: Run) -> str:
    """Every shape of the benchmark of far keys in a row, expected ratios by operations before the measured ones."""
    names = list(run["results"][0]["variants"])
    rows = []
    for result in run["results"]:
        expected = [f"{result['variants'][name]['operations']:.2f}" for name in names]
        measured = ratios(result, [f"{name} / global" for name in names])
        pairs = [f"{by_count}: {found}" for by_count, found in zip(expected, measured, strict=True)]
        error = max(variant["error"] for variant in result["variants"].values())
        rows.append([*layer(result), *pairs, f"{error:.1e}"])
    header = ["layer", "frames x tokens", "heads x D", *(f"{name} / global" for name in names)]
    return table([*header, "largest error against explicit weights"], rows)


def far_latents(run: Run) -> str:
    """Distances of final latents from exact FreeSpec: mean and range, over that of sliding_window, and CPU time."""
    found = run["results"]
    prompts, window = (
        {row["prompt"] for row in found},
        statistics.mean(row["distance"]["sliding_window"] for row in found),
    )
    rows = []
    for name in found[0]["distance"]:
        distances = [row["distance"][name] for row in found]
        seconds = [row["cpu_s"][name] / row["cpu_s"]["freespec"] for row in found]
        mean = statistics.mean(distances)
        spread = f"{mean:.3f} ({min(distances):.3f} to {max(distances):.3f})"
        rows.append([name, spread, f"{mean / window:.2f}", f"{statistics.median(seconds):.2f}"])
    header = ["variant", "distance from FreeSpec with all keys", "over sliding_window", "CPU time over FreeSpec"]
    videos = f"{len(found)} videos of {len(prompts)} held-out prompts, {run['settings']['video.num_frames']} frames"
    return f"{table(header, rows)}\n\n{videos}, {run['settings']['sampler.num_steps']} steps; latents, relative, Frobenius."


def caches(run: Run) -> str:
    """Each method and step cache: quality beside that of none, distance of the latents, CPU time, and cached steps."""
    by_variant: dict[tuple[str, str], list[Run]] = {}
    for row in run["results"]:
        by_variant.setdefault((row["method"], row["cache"]), []).append(row)
    rows = []
    for (method, cache), found in by_variant.items():
        before = by_variant[method, "none"]
        change = [row["quality"] - none["quality"] for row, none in zip(found, before, strict=False)]
        seconds = [row["cpu_s"] / none["cpu_s"] for row, none in zip(found, before, strict=False)]
        distances = [row["distance"] for row in found]
        rows.append(
            [
                method,
                cache,
                f"{statistics.mean(row['quality'] for row in found):.3f}",
                "" if cache == "none" else f"{statistics.mean(change):+.3f} ({min(change):+.3f} to {max(change):+.3f})",
                "" if cache == "none" else f"{statistics.mean(distances):.3f}",
                f"{statistics.median(seconds):.2f}",
                f"{statistics.mean(row['cached'] for row in found):.1f}",
            ]
        )
    header = ["method", "cache", "quality", "change (range)", "distance of latents", "CPU time", "steps from the cache"]
    settings, prompts = run["settings"], {row["prompt"] for row in run["results"]}
    size = f"{settings['video.num_frames']} frames, {settings['sampler.num_steps']} steps"
    return f"{table(header, rows)}\n\n{len(prompts)} held-out prompts, {size}; CPU time of denoising, over `none`."


def peaked(run: Run) -> str:
    """Errors of the global branch, a sharpness in a row: means over the draws."""
    sizes = list(dict.fromkeys(tuple(row["size"]) for row in run["results"]))
    cells: dict[float, list[str]] = {}
    for row in run["results"]:
        errors, weights = zip(*row["errors"], strict=True)
        line = cells.setdefault(row["sharpness"], [f"{statistics.mean(weights):.3f}"])
        line.append(f"{statistics.mean(errors):.2f}")
    kept = [f"error, {kept} of {rows * columns} tokens kept" for rows, columns, kept in sizes]
    return table(["largest weight of a query, mean", *kept], list(cells.values()))


def minutes(run: Run) -> str:
    """CPU seconds of a step and a frame, over those of the shortest video with the same far keys, and peak memory."""
    first: dict[str, float] = {}
    rows = []
    for row in run["results"]:
        per_frame = row["denoise_cpu_s"] / sum(row["steps"].values()) / row["frames"]
        base = first.setdefault(row["far"], per_frame)
        peak = row["peak_mib"]
        beyond = [peak["denoised"] - peak["loaded"], peak["decoded"] - peak["denoised"]]
        rows.append(
            [
                str(row["frames"]),
                str(row["latent_frames"]),
                row["far"],
                f"{per_frame * 1e3:.3g}",
                f"{per_frame / base:.2f}",
                f"{row['decode_cpu_s'] / row['frames'] * 1e3:.3g}",
                f"{peak['loaded']:.0f}",
                *(f"{more:.0f}" for more in beyond),
                f"{row['latents_mib']:.2f}",
            ]
        )
    header = [
        "frames",
        "latent frames",
        "far keys",
        "CPU ms per step and frame",
        "over the shortest",
        "decode, CPU ms per frame",
    ]
    return table([*header, "MiB when loaded", "more in denoising", "more in decoding", "latents, MiB"], rows)


def long_measures(run: Run) -> str:
    """What the measures of long videos find on clips whose truth is known, a kind in a row."""
    rows = []
    for row in run["results"]:
        values = [clip["values"] for clip in row["measures"]]
        truths = [clip["truth"] for clip in row["measures"]]

        def middle(name: str, values: list[dict[str, float]] = values) -> str:
            """Median and range."""
            found = sorted(each[name] for each in values)
            return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"

        loops = sum(each["loop"] >= run["settings"]["loop"] for each in values)
        right = [
            each["loop_lag"] == true["loop_lag"]
            for each, true in zip(values, truths, strict=True)
            if "loop_lag" in true
        ]
        lags = f", length right in {sum(right)}" if right else ""
        rows.append(
            [
                row["clips"],
                f"{loops} of {len(values)}{lags}",
                middle("loop"),
                middle("alike_near"),
                middle("alike_far"),
                middle("colour_slope"),
                middle("sharpness_slope"),
                middle("cuts"),
            ]
        )
    header = [
        "clips",
        f"loop >= {run['settings']['loop']}",
        "loop",
        "alike_near",
        "alike_far",
        "colour_slope",
        "sharpness_slope",
    ]
    return table([*header, "cuts"], rows)


def fusion(run: Run) -> str:
    """Every shape of the fusion benchmark in a row."""
    names = ["fusion / SVD in fp32", "fusion / dual attention"]
    rows = []
    for result in run["results"]:
        parts = " + ".join(milliseconds(result["variants"][name]["wall_s"]["median"]) for name in PARTS)
        errors = [f"{result['variants'][name]['error']:.1e}" for name in ("fusion", "SVD in fp32")]
        rows.append([*layer(result), parts, *ratios(result, names), *errors])
    header = ["layer", "frames x tokens", "heads x D", f"ms: {' + '.join(PARTS)}", *names]
    return table([*header, "error against the SVD in fp64", "error of the SVD in fp32"], rows)


def parallel(run: Run) -> str:
    """Times of every layout, the rates of every collective, and whether the planned bytes were sent."""
    modes = list(dict.fromkeys(row["mode"] for row in run["results"]))
    layouts: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in run["results"]:
        # files from before the predictions have none
        ratio = f" ({row['measured_over_predicted']:.2g})" if row.get("measured_over_predicted") else ""
        layout = row["shape"], row["ranks"], f"{row['ring']} x {row['ulysses']}"
        layouts.setdefault(layout, {})[row["mode"]] = f"{row['ms']:.3g}{ratio}"
    rows = [[*map(str, layout), *(found.get(mode, "") for mode in modes)] for layout, found in layouts.items()]
    header = ["layer", "ranks", "ring x ulysses", *(f"{mode}, ms (of predicted)" for mode in modes)]
    planned = [row["bytes_as_planned"] for row in run["results"]]
    sent = f"Bytes that were sent as planned, exactly: {planned.count(True)} of {len(planned)} rows."
    by_ranks = run["settings"]["gb_per_second"]
    kinds = list(next(iter(by_ranks.values()), {}))
    rates = [[ranks, *(f"{by_kind[kind]:.2f}" for kind in kinds)] for ranks, by_kind in by_ranks.items()]
    links = table(["ranks", *(f"{kind.replace('_', '-')} GB/s" for kind in kinds)], rates) if rates else ""
    return "\n\n".join(part for part in (table(header, rows), sent, links) if part)


def memory(run: Run) -> str:
    """Peaks of a step, counted on tensors without values."""
    rows = [
        [
            row["model"].partition("/")[2],
            f"{row['ring']} x {row['ulysses']}",
            *(f"{row['gib'][mode]:.2f}" for mode in ("global", "local", "dual")),
            f"{row['weights_gib']:.1f}",
            f"{row['ratios']['with weights']:.3f}",
        ]
        for row in run["results"]
    ]
    header = ["model, 321 frames", "ring x ulysses", "global, GiB", "local, GiB", "dual, GiB"]
    return table([*header, "weights, GiB", "dual / global with weights"], rows)


def timeline(run: Run) -> str:
    """What each transition costs over the plain prompt."""
    names = list(run["results"][0]["ratios"])
    return table(["model", *names], [[result["shape"], *ratios(result, names)] for result in run["results"]])


def provenance(run: Run) -> str:
    """Where and when a file was measured; the file also names the commit and the machine's load."""
    at, settings = run["environment"], run["settings"]
    text = (
        f"{at['device_name']}, threads: {at['threads']} of {at['cores']}, torch {at['torch']}, {settings['dtype']}, "
        f"rounds: {settings['repeats']}, {at['date']}"
    )
    return f"{text}{'; ' + at['note'] if at['note'] else ''} (`{run['file']}`)."
