"""The planner's assumed rates against figures that others published."""

from dataclasses import replace

import pytest

from benchmarks.published import BAND, FIGURES, LARGE, Figure


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.gpu}-{figure.source}")
def test_a_published_figure_is_predicted(figure: Figure) -> None:
    assert abs(figure.over_published - 1) <= BAND


def test_another_kernel_would_be_out_of_the_band() -> None:
    """The negative control: stock diffusers with the fast engines' kernel, and these with FlashAttention 2."""
    stock, fast = (figure for figure in FIGURES if figure.model == LARGE and figure.per_step)
    for figure, kernel in ((stock, "auto"), (fast, "cuda_flash")):
        assert abs(replace(figure, kernel=kernel).over_published - 1) > BAND
