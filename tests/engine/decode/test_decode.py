"""Streamed decoding is the decoding of the whole, with one latent frame in memory."""

import numpy as np
import pytest
import torch

from engine.decode.pieces import stream_decode, to_uint8
from tests.tiny_pipelines import random_wan


@pytest.mark.parametrize("num_latents", [1, 2, 7])
@torch.no_grad()
def test_equal_to_the_pipelines_decode(num_latents):
    pipe = random_wan()
    latents = torch.randn(1, 4, num_latents, 4, 6)
    mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    whole = pipe.vae.decode(latents / inverse_std + mean).sample
    parts = list(stream_decode(pipe.vae, latents))
    assert [part.shape[2] for part in parts] == [1] + [4] * (num_latents - 1)
    assert torch.equal(torch.cat(parts, dim=2), whole)
    frames = np.concatenate([to_uint8(part) for part in parts])
    stock = pipe.video_processor.postprocess_video(whole, output_type="np")[0]
    assert np.array_equal(frames, (stock * 255).round().astype("uint8"))


@torch.no_grad()
def test_a_stopped_stream_leaves_no_cache_behind():
    pipe = random_wan()
    latents = torch.randn(1, 4, 3, 4, 4)
    whole = torch.cat(list(stream_decode(pipe.vae, latents)), dim=2)
    stream = stream_decode(pipe.vae, latents)
    next(stream)
    stream.close()
    assert all(entry is None for entry in pipe.vae._feat_map)
    assert torch.equal(torch.cat(list(stream_decode(pipe.vae, latents)), dim=2), whole)
    # Negative control: a chunk that does not start with a clean cache differs.
    stream = stream_decode(pipe.vae, latents[:, :, 1:])
    assert not torch.equal(torch.cat(list(stream), dim=2)[:, :, 1:], whole[:, :, 5:])
