"""The shipped checkpoints: small, plain, quiet to load, and as good as their cards say."""

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import tiny
from tiny.evaluate import reconstruction_psnr, sample
from tiny.families import FAMILIES
from tiny.measure import read

ROOT = Path(tiny.__file__).parent
SCHEDULERS = {"wan": "UniPCMultistepScheduler", "ltx": "FlowMatchEulerDiscreteScheduler"}
MIB = 2**20


class Collector(logging.Handler):
    """Keeps what diffusers and transformers log from WARNING on; they hand nothing to the root logger."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(name):
    collector = Collector()
    loggers = [logging.getLogger(library) for library in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(collector)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = DiffusionPipeline.from_pretrained(str(ROOT / name), dtype=torch.float32)
    for logger in loggers:
        logger.removeHandler(collector)
    pipe.set_progress_bar_config(disable=True)
    return pipe, collector.messages + [str(warning.message) for warning in caught]


def test_it_is_small_and_holds_nothing_but_safetensors_and_text(name):
    files = [path for path in (ROOT / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * MIB
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}


def test_it_loads_without_a_word(loaded, name):
    pipe, messages = loaded
    assert messages == []
    parts = {type(part).__name__ for part in pipe.components.values() if part is not None}
    assert {type(pipe).__name__, *parts} >= {*FAMILIES[name].classes, SCHEDULERS[name]}


def test_the_token_embedding_is_shared_after_loading(loaded):
    encoder = loaded[0].text_encoder
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight
    assert encoder.shared.weight.isfinite().all()


def test_the_autoencoder_is_as_good_as_the_card_says(loaded, name):
    figures = json.loads((ROOT / name / "figures.json").read_text())
    assert reconstruction_psnr(loaded[0], 3) >= figures["vae_psnr_db"] - 1


def test_it_makes_what_is_asked_for(loaded, name):
    clip = sample(FAMILIES[name], loaded[0], ["a red circle bounces over a blue background"], [0])[0]
    reading = read(clip)
    assert clip.shape == (33, 64, 64, 3)
    assert (reading.shape, reading.colour, reading.background) == ("circle", "red", "blue")
