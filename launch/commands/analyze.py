"""analyze.py: measure effective rank at windows of 1 to 4 native lengths, and make videos of low rank."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch

from engine.batch.items import FILE
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.whole import describe_error
from engine.paths import expand
from engine.planner.model import read_model
from engine.progress import enabled
from engine.shown import quoted
from engine.spectra.windows import WindowSpectra
from evaluation.analysis.layers import UNTREATED, layer_settings
from evaluation.analysis.spectra import SpectraStore
from evaluation.analysis.tables import write_analysis
from evaluation.comparison.store import Comparison
from evaluation.measure import Measurer
from launch.arguments.analyze import Arguments
from launch.batching.comparison import check_longer, model_facts, open_maker, stoppable
from launch.batching.devices import arrange_for
from launch.process.environment import is_first_rank
from launch.process.stopping import Stopped
from launch.ranks.join import DistContext
from launch.video.outputs import claim_outputs
from launch.video.prompts import look_at_prompts

LOW_RANK = "freespec.methods.low_rank:LowRank"


def run(asked: Arguments) -> None:
    """Run what is missing on all ranks, then write tables and plots on rank 0."""
    given, prompts = asked.given, asked.prompts.texts
    check_longer(asked.config, "windows can only grow in a longer video")
    folder = expand(given.out)
    variants, ratios = low_rank_variants(asked.config, asked.shares)
    probed = layer_variants(asked.config) if given.num_probed else []
    config, arranged = arrange_for(asked.config, [*variants, *probed], asked.replicas)
    variants, probed = arranged[: len(variants)], arranged[len(variants) :]
    facts = model_facts(config)
    watched = Comparison(
        folder=folder,
        model=facts,
        variants=[Variant(label=config.method.name, config=config)],
        prompts=prompts,
        seeds=[config.sampler.seed],
    )
    spectra = SpectraStore(watched=watched, num_points=given.num_points)
    low_rank, layers = (
        dataclasses.replace(watched, folder=folder / name, variants=some, prompts=prompts[:count]) if count else None
        for name, some, count in (
            ("low-rank", variants, given.num_reconstructed),
            ("layers", probed, given.num_probed),
        )
    )
    now = spectra.describe()
    with contextlib.ExitStack() as stack:
        make(asked, spectra, [each for each in (low_rank, layers) if each is not None], now, stack)
        if not is_first_rank():
            return
        measurer = Measurer(workers=asked.given.workers, progress=enabled(asked.config.output.progress))
        with stoppable(folder):
            print(write_analysis(folder, spectra, low_rank, ratios, layers=layers, made_with=now, measurer=measurer))


def low_rank_variants(config: RunConfig, shares: list[float]) -> tuple[list[Variant], dict[str, float]]:
    """Make a variant for each share of `--ratios`, largest first; also return the share by label."""
    variants = []
    for share in shares:
        try:
            method = dataclasses.replace(config.method, name=LOW_RANK, settings={"ratio": share})
        except ValueError as error:
            raise UserError(f"--ratios {share:g}: {error}") from error
        label = f"ratio-{share:g}"
        variants.append(Variant(label=label, config=dataclasses.replace(config, method=method)))
    _check_different(variants, shares, read_model(config.model).head_dim)
    return variants, {variant.label: share for variant, share in zip(variants, shares, strict=True)}


def layer_variants(config: RunConfig) -> list[Variant]:
    """Direct, and FreeLOC in each layer alone, once with its positions and once with its sparsity."""
    freeloc = config.method.freeloc
    methods = {UNTREATED: dataclasses.replace(config.method, name=UNTREATED, settings={})}
    for label, layers in layer_settings(read_model(config.model).layers).items():
        alone = dataclasses.replace(freeloc, **layers)
        try:
            methods[label] = dataclasses.replace(config.method, name="freeloc", freeloc=alone, settings={})
        except ValueError as error:
            raise UserError(f"--num_probed makes videos with FreeLOC: {error}") from error
    return [
        Variant(label=label, config=dataclasses.replace(config, method=method)) for label, method in methods.items()
    ]


def _check_different(variants: list[Variant], shares: list[float], head_dim: int) -> None:
    """Raise UserError for two shares with the same number of directions or the same label."""
    cpu = torch.device("cpu")
    counts = [int(each.config.method.method.weights(None, None, head_dim, cpu).sum()) for each in variants]
    for index in range(1, len(variants)):
        if counts[index] == counts[index - 1] or variants[index].label == variants[index - 1].label:
            raise UserError(
                f"--ratios {shares[index - 1]!r} and {shares[index]!r} keep {counts[index - 1]} and {counts[index]} of {head_dim} "
                f"directions and are called {variants[index - 1].label} and {variants[index].label}; leave one out"
            )


def make(
    asked: Arguments,
    spectra: SpectraStore,
    comparisons: Sequence[Comparison],
    now: dict[str, Any],
    stack: contextlib.ExitStack,
) -> None:
    """Run what is missing; all ranks call this. `now` is what `SpectraStore.describe` says; `stack` holds the folder's claim.

    `comparisons` are those of videos.
    """
    config, agree = spectra.watched.config, [json.dumps(now, sort_keys=True), str(spectra.seed)]
    with open_maker(config, agree=agree, verbose=asked.given.verbose, replicas=asked.replicas) as maker:
        context = maker.context
        for comparison in comparisons:
            maker.check(comparison)
        look_at_prompts(config, asked.prompts.named, context)
        report = [spectra.folder / "report.json", *(comparison.folder / FILE for comparison in comparisons)]
        context.check_on_first(lambda: stack.enter_context(claim_outputs(report, flag="--out")))
        context.check_on_first(spectra.open)
        missing = [maker.missing(comparison) for comparison in comparisons]
        unseen = [index for index, done in enumerate(context.compute_on_first(lambda: spectra.done)) if not done]
        if unseen and asked.replicas is not None:
            raise UserError(
                f"the spectra of {len(unseen)} of {len(spectra.prompts)} prompts are missing, and replicas make the low-rank and "
                "layer videos alone; measure the spectra first, without --replicas and with --num_reconstructed 0 --num_probed 0"
            )
        if unseen:
            observe(maker.engine, spectra, unseen, context)
        for comparison, videos in zip(comparisons, missing, strict=True):
            maker.make(comparison, videos)


def observe(engine: LongVideoEngine, spectra: SpectraStore, unseen: list[int], context: DistContext) -> None:
    """Measure the spectra of these prompts; rank 0 prints a line for each."""
    for number, index in enumerate(unseen):
        if number > 0:
            context.wait_for_first(f"spectra {number - 1}")
        try:
            _observe(engine, spectra, index)
        except KeyboardInterrupt as error:
            kept = sum(spectra.done)
            raise Stopped(
                f"while prompt {index} was watched; {kept} of {len(spectra.prompts)} are kept in {spectra.folder}, "
                "and the same command continues"
            ) from error
        except OSError as error:
            raise UserError(describe_error(error, spectra.file(index))) from error
        if engine.is_first:
            print(
                f"{number + 1} of {len(unseen)}, {spectra.file(index)}: spectra of {quoted(spectra.prompts[index])}",
                flush=True,
            )


def _observe(engine: LongVideoEngine, spectra: SpectraStore, index: int) -> None:
    """Denoise one prompt and keep the measured spectra; all ranks call this, rank 0 writes."""
    measured = WindowSpectra(steps=frozenset(spectra.steps))
    denoised = engine.denoise(
        spectra.prompts[index],
        seed=spectra.seed,
        snapshot=spectra.snapshot(index),
        snapshot_every=engine.config.output.snapshot_every,
        trace=measured,
    )
    if engine.is_first:
        spectra.keep(index, measured.rows, denoised.steps)
