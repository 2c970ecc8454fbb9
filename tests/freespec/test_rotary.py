"""RIFLEx: which frequency changes, from when on, and the table that results, written out by hand."""

import math

import pytest
import torch

from freespec.riflex import Riflex, lowered_frequency
from freespec.rotary import with_frequency

# Wan2.1: 44 temporal channels, theta 10000. Periods of the first nine in latent frames: 6.3, 9.5, 14.5, 22.1, 33.5, 51.0, ..
WAN = [10000.0 ** (-2 * pair / 44) for pair in range(22)]


def test_the_frequency_whose_period_is_nearest_to_the_first_repetition() -> None:
    periods = [2 * math.pi / frequency for frequency in WAN]
    assert [round(period, 1) for period in periods[:9]] == [6.3, 9.5, 14.5, 22.1, 33.5, 51.0, 77.5, 117.7, 178.9]
    cases = {None: 3, 21.0: 3, 30.0: 4, 50.0: 5, 70.0: 6}  # None: the native length, 21
    for repetition, pair in cases.items():
        made = lowered_frequency(Riflex(enabled=True, repetition=repetition), WAN, num_frames=81, window_frames=21)
        assert made == (pair, 0.9 * 2 * math.pi / 81)
    by_hand = lowered_frequency(Riflex(enabled=True, index=6), WAN, num_frames=81, window_frames=21)
    assert by_hand == (5, 0.9 * 2 * math.pi / 81)


def test_by_default_a_period_that_holds_the_native_length_and_never_a_video_of_it() -> None:
    """The embedded model's periods of 6.3 and 19.9 frames: 6.3 is nearer to its native 9, and came round in training."""
    frequencies = [2 * math.pi / period for period in (6.3, 19.9)]

    def change(frames: int, window: int = 9, **settings: float) -> tuple[int, float] | None:
        riflex = Riflex(enabled=True, **settings)
        return lowered_frequency(riflex, frequencies, num_frames=frames, window_frames=window)

    assert change(36) == (1, 0.9 * 2 * math.pi / 36)
    assert change(19) is None
    for asked in ({"index": 1}, {"repetition": 6.0}):  # said by the user, and still not at native length
        assert change(10, **asked) == (0, 0.9 * 2 * math.pi / 10)
        assert change(9, **asked) is None
        assert change(7, **asked) is None
    with pytest.raises(
        ValueError, match=r"riflex: the longest of the model's periods is 19.9 frames, less than the native 20"
    ):
        change(36, window=20)
    assert change(36, window=20, index=2) == (1, 0.9 * 2 * math.pi / 36)


def test_only_above_the_period_and_only_if_asked() -> None:
    for frames, changes in ((21, False), (22, False), (23, True)):  # the fourth period is 22.1
        made = lowered_frequency(Riflex(enabled=True, index=4), WAN, num_frames=frames, window_frames=21)
        assert (made is not None) == changes
    assert lowered_frequency(Riflex(), WAN, num_frames=81, window_frames=21) is None
    with pytest.raises(ValueError, match="riflex: index 23 of the model's 22 temporal frequencies"):
        lowered_frequency(Riflex(enabled=True, index=23), WAN, num_frames=81, window_frames=21)


def test_the_table_is_the_one_written_by_hand() -> None:
    frames, frame_tokens, frequencies = 7, 6, [1.0, 0.4, 0.1]
    by_token = [[f * w for w in frequencies] for f in range(frames) for _ in range(frame_tokens)]
    angles = torch.tensor(by_token, dtype=torch.float64)
    tables = tuple(angle.repeat_interleave(2, -1)[None, :, None] for angle in (angles.cos(), angles.sin()))
    changed = with_frequency(tables, 0.05, columns=slice(2, 4), frame_tokens=frame_tokens)
    for table, before, curve in zip(changed, tables, (math.cos, math.sin), strict=True):
        for token in range(frames * frame_tokens):
            for column, frequency in enumerate((1.0, 1.0, 0.05, 0.05, 0.1, 0.1)):
                assert table[0, token, 0, column].item() == pytest.approx(
                    curve(token // frame_tokens * frequency), abs=1e-12
                )
        assert not torch.equal(table, before)  # and the argument is as it was
        assert before[0, -1, 0, 2].item() == pytest.approx(curve(6 * 0.4), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index": 0}, "riflex: index must be 1 or more, got 0"),
        ({"index": 2, "repetition": 6.0}, "riflex: index 2 and repetition 6.0 both name the frequency; leave one"),
        ({"repetition": 0.0}, "riflex: repetition must be a finite number of frames, more than 0, got 0.0"),
        ({"repetition": float("nan")}, "got nan"),
    ],
)
def test_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Riflex(enabled=True, **settings)


@pytest.mark.parametrize("name", ["index", "repetition"])
def test_unused_setting_is_refused(name: str) -> None:
    message = f"riflex: {name} 3 has no effect while enabled is false; set enabled true, or {name} null"
    with pytest.raises(ValueError, match=message):
        Riflex(**{name: 3})
    Riflex(**{name: None})
