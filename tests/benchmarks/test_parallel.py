"""The benchmark of layers over ranks: what it sends is what is planned, and what it predicts follows from what it measured."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import collectives, parallel, predicted, tables
from benchmarks.collectives import GRAMS, MESSAGE_MIB, busiest_share, measure_collectives, predict_seconds
from benchmarks.gpu_report import efficiency_with_messages
from benchmarks.measure import SHAPES
from engine.planner.gpu import read_gpu
from parallel.shards import SequencePlan
from tests.ranks import run_ranks

KINDS = {"all_to_all", "halo", "ring", "reduce", "gather", "cfg", "broadcast", "collect"}
RATES = {"all_to_all": 1.0, "halo": 2.0, "ring": 4.0, "reduce": 0.5}  # GB/s
SENT = {"all_to_all": 10**9, "halo": 10**9, "ring": 10**9, "reduce": 10**9}  # 1 s, 0.5 s, 0.25 s and 2 s
PLAN = SequencePlan(tokens=9, heads=3, ring=2, ulysses=2)  # the busiest rank has 5 of 9 queries and 2 of 3 heads
SHARE = 10 / 27


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file of a short run on 1 and 2 ranks."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        words = ["--shapes", "tiny", "--ranks", "1", "2", "--repeats", "1", "--results", str(folder)]
        patch.setattr(sys, "argv", ["benchmarks.parallel", *words])
        parallel.main()
    [path] = folder.iterdir()
    return json.loads(path.read_text()) | {"file": path.name}


def test_every_row_has_a_prediction_from_the_same_run(written: dict[str, Any]) -> None:
    rows, settings = written["results"], written["settings"]
    assert [(row["ranks"], row["ring"], row["mode"]) for row in rows] == [
        (ranks, ring, mode) for ranks, ring in ((1, 1), (2, 1), (2, 2)) for mode in parallel.MODES
    ]
    assert set(settings["gb_per_second"]) == {"2"}
    assert set(settings["gb_per_second"]["2"]) == KINDS
    assert min(settings["gb_per_second"]["2"].values()) > 0
    alone = {row["mode"]: row["ms"] for row in rows if row["ranks"] == 1}
    for row in rows:
        assert row["bytes_as_planned"] is True
        assert row["measured_over_predicted"] == pytest.approx(row["ms"] / row["predicted_ms"], rel=1e-3)
        assert row["speedup"] == pytest.approx(alone[row["mode"]] / row["ms"], rel=1e-3)
        plan = SequencePlan(tokens=33 * 64, heads=6, ring=row["ring"], ulysses=row["ulysses"])
        rates = settings["gb_per_second"].get(str(row["ranks"]), {})
        again = predict_seconds(plan, alone[row["mode"]] / 1e3, row["bytes"], rates, devices=settings["devices"])
        assert row["predicted_ms"] == pytest.approx(again * 1e3, rel=1e-3)
        if row["ranks"] == 1:
            assert row["predicted_ms"] == row["ms"]


def test_the_page_shows_measured_and_predicted(written: dict[str, Any]) -> None:
    page = tables.parallel(written)
    assert "| global, ms (of predicted) | local, ms (of predicted) | dual, ms (of predicted) |" in page
    assert "| ranks | all-to-all GB/s | halo GB/s | ring GB/s | reduce GB/s |" in page
    rows = [row for row in written["results"] if (row["ranks"], row["ulysses"]) == (2, 2)]
    cells = [f"{row['ms']:.3g} ({row['measured_over_predicted']:.2g})" for row in rows]
    assert [row["mode"] for row in rows] == ["global", "local", "dual"]
    assert f"| tiny | 2 | 1 x 2 | {' | '.join(cells)} |" in page
    count = len(written["results"])
    assert f"exactly: {count} of {count} rows" in page


def test_a_page_of_a_file_without_predictions_leaves_them_blank(written: dict[str, Any]) -> None:
    new = ("predicted_ms", "measured_over_predicted")
    old = [{key: value for key, value in row.items() if key not in new} for row in written["results"]]
    page = tables.parallel(written | {"results": old})
    assert f"| tiny | 1 | 1 x 1 | {old[0]['ms']:.3g} |" in page


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_collective_sends_what_it_should(ranks: int, tmp_path: Path) -> None:
    [by_rank] = run_ranks(ranks, measure_collectives, [(ranks, 1)], tmp_path, timeout=collectives.TIMEOUT)
    token = ranks * collectives.HEAD_DIM * 4
    message = MESSAGE_MIB * 2**20 // (2 * token) * 2 * token  # an even number of tokens of all heads, fp32
    others, grams = ranks - 1, 2 * 12 * 128**2 * 8
    assert GRAMS[:2] == (2, 1)
    for rank, found in enumerate(by_rank):
        neighbours = (rank > 0) + (rank < others)
        assert {kind: sent for kind, (sent, _) in found.items()} == {
            "all_to_all": message // ranks * others,
            "halo": message * neighbours,  # keys and values of all its tokens, half of the message's, to each neighbour
            "ring": message * others,
            "reduce": grams * others,
            "gather": message * others,
            "cfg": message * others,
            "broadcast": message * others * (rank == 0),
            "collect": message * (rank > 0),
        }
        assert all(len(seconds) == 1 and seconds[0] > 0 for _, seconds in found.values())


def test_a_prediction_adds_the_busiest_share_and_every_message() -> None:
    assert busiest_share(PLAN) == pytest.approx(SHARE)
    assert predict_seconds(PLAN, 3.0, SENT, RATES, devices=4) == pytest.approx(3 * SHARE + 1 + 0.5 + 0.25 + 2)
    # Each kind counts: without one of them the sum is shorter by its time.
    for kind, seconds in {"all_to_all": 1.0, "halo": 0.5, "ring": 0.25, "reduce": 2.0}.items():
        fewer = predict_seconds(PLAN, 3.0, SENT | {kind: 0}, RATES, devices=4)
        assert fewer == pytest.approx(3 * SHARE + 3.75 - seconds)


def test_too_few_cores_are_shared_and_spare_ones_hide_the_ring() -> None:
    assert predict_seconds(PLAN, 3.0, {}, {}, devices=2) == pytest.approx(1.5)  # half of the work on each of two cores
    assert predict_seconds(PLAN, 3.0, {}, {}, devices=1) == pytest.approx(3.0)
    one = SequencePlan(tokens=9, heads=3, ring=1, ulysses=1)
    assert predict_seconds(one, 3.0, {}, {}, devices=2) == pytest.approx(3.0)
    ring = {"ring": 10**9}
    hidden, exposed = (predict_seconds(PLAN, 3.0, ring, RATES, devices=devices) for devices in (8, 4))
    assert exposed - hidden == pytest.approx(0.25)
    assert predict_seconds(PLAN, 0.003, ring, RATES, devices=8) > 0.24  # what computing is too short for is waited for


def test_a_message_of_unknown_rate_is_an_error() -> None:
    with pytest.raises(KeyError, match="halo"):
        predict_seconds(PLAN, 3.0, {"halo": 1}, {"ring": 1.0}, devices=4)


def test_messages_lower_the_efficiency_of_a_share() -> None:
    """By the bytes of a share over the stated bandwidth: 2 GB/s here."""
    shape, gpu = SHAPES["tiny"], replace(read_gpu("h100"), intra_node_gb_s=4.0, link_fraction=0.5, gpus_per_node=8)
    row = {"axis": "ulysses", "ranks": 2, "mode": "global", "wall_s": {"median": 0.004}, "efficiency": 1.0}
    sent = 4 * 33 * 64 * 6 * 32 * 2 // 4  # q, k, v and the output in bf16: half of a rank's half leaves
    found = efficiency_with_messages(row, shape, gpu)
    assert found == pytest.approx(0.004 / (0.004 + sent / 2e9))
    assert efficiency_with_messages(row, shape, replace(gpu, intra_node_gb_s=2.0)) < found
    ring = row | {"axis": "ring"}
    assert efficiency_with_messages(ring, shape, gpu) == 1.0  # blocks travel while others are attended
    assert efficiency_with_messages(ring | {"mode": "fusion"}, shape, gpu) < 1.0


def test_the_goals_have_a_row_of_eight_gpus_for_each_family() -> None:
    wan, ltx = predicted.eight_gpus()
    assert (wan[0], wan[4]) == ("efficiency of 8 GPUs, FreeSpec", "yes")
    assert (ltx[0], ltx[4]) == ("efficiency of 8 GPUs, FreeSpec, LTX-Video 2B", "**no**")


def test_methods_that_cannot_have_the_row_s_layout_have_their_best() -> None:
    row = {"seconds_direct": 60.0, "elsewhere": {"freepca": ("cfg 2 x ring 1 x ulysses 2", 90.0)}}
    marks = {"cfg 2 x ring 1 x ulysses 2": "a"}
    cells = [predicted.predicted_minutes(row, name, marks) for name in ("direct", "freepca", "freenoise")]
    assert cells == ["1.0", "1.5 (a)", "-"]
