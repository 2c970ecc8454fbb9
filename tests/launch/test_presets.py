"""The rows of the ablation table as presets laid over a model's, and settings of a method of the user's own."""

import dataclasses
import datetime
from pathlib import Path

import pytest

from engine.config import MethodConfig, RunConfig
from engine.errors import UserError
from freespec.methods import METHODS, FreeSpec, make_method
from launch.cli.parser import parse_run

ROOT = Path(__file__).parent.parent.parent
# Table 3 of the paper: basis, rank-aware, time-aware, residual.
ROWS = {
    "gb": ("global", False, False, "none"),
    "lb_fixed": ("local", False, False, "none"),
    "ra": ("local", True, False, "none"),
    "ta": ("local", False, True, "none"),
    "ra_ta": ("local", True, True, "none"),
    "f_gr": ("local", True, True, "fixed"),
    "t_gr": ("local", True, True, "time"),
}


def parse(*words: str) -> RunConfig:
    return parse_run(words, name="test", description="", add_arguments=lambda parser: None)[1]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("model", ["tiny-wan", "tiny-ltx", "wan2.1-t2v-1.3b", "ltx-video-2b"])
def test_a_row_of_the_ablation_over_a_model(name: str, model: str) -> None:
    base = parse("--config", f"configs/{model}.yaml")
    row = parse("--config", f"configs/{model}.yaml", "--config", f"configs/ablation/{name}.yaml")
    basis, rank, time, residual = ROWS[name]
    assert row.method.freespec == FreeSpec(basis=basis, rank=rank, time=time, residual=residual)
    assert row.method.name == "freespec"
    assert (row.model, row.video, row.sampler) == (base.model, base.video, base.sampler)  # all else is the model's
    assert row.method.window_frames == base.method.window_frames


def test_a_row_sets_every_switch_whatever_lay_below_it(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        "method: {name: direct, freespec: {basis: global, rank: false, time: false, residual: fixed, alpha: 2.0}}"
    )
    words = ["--config", "configs/tiny-wan.yaml", "--config", str(other), "--config", "configs/ablation/t_gr.yaml"]
    assert parse(*words).method.freespec == FreeSpec(alpha=2.0)
    assert parse(*words, "--method.freespec.rank=false").method.freespec == FreeSpec(alpha=2.0, rank=False)


def test_the_presets_are_the_seven_rows() -> None:
    assert {path.stem for path in (ROOT / "configs" / "ablation").glob("*.yaml")} == set(ROWS)
    assert len({tuple(row) for row in ROWS.values()}) == 7


@pytest.mark.parametrize("preset", ["wan2.1-t2v-14b-4steps", "wan2.2-t2v-a14b-4steps"])
def test_the_preset_of_four_steps_has_the_published_ones(preset: str) -> None:
    """Its authors write 1000, 750, 500 and 250 with shift 5, and the split fuses in half of them."""
    config = parse("--config", f"configs/{preset}.yaml")
    published = [5 * t / (1 + 4 * t) for t in (1.0, 0.75, 0.5, 0.25)]
    assert config.sampler.levels == pytest.approx(published, abs=1e-6)
    assert (config.sampler.num_steps, config.sampler.guidance_scale) == (4, 1.0)
    for name in ("freespec", "freepca"):
        method = dataclasses.replace(config.method, name=name).method
        assert len({step.mode for step in method.plan([1000 * level for level in published])}) == 2, name


@pytest.mark.parametrize("preset", ["13b-0.9.7-distilled", "13b-0.9.8-distilled", "2b-0.9.8-distilled"])
def test_distilled_ltx_video_has_the_published_steps(preset: str) -> None:
    """Without guidance, and the split fuses in half of them."""
    config = parse("--config", f"configs/ltx-video-{preset}.yaml")
    assert config.sampler.timesteps == (1000, 993, 987, 981, 975, 909, 725, 0.03)
    assert (config.sampler.guidance_scale, config.decode.timestep, config.decode.noise_scale) == (1.0, 0.05, 0.025)
    for name in ("freespec", "freepca"):
        plan = dataclasses.replace(config.method, name=name).method.plan(config.sampler.timesteps)
        assert len({step.mode for step in plan}) == 2, name


OWN = """
from dataclasses import dataclass
from freespec.methods import Method, StepPlan


@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    depth: int = 1
    form: str = "square"

    def plan(self, timesteps):
        return [StepPlan(mode="global") for _ in timesteps]


class Unfinished(Method):
    pass


class Stranger:
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the directory that the command is started in, which is not on Python's path."""
    name = f"own_method_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"{name}_broken.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    return name


def test_a_method_of_ones_own_with_its_settings(own: str, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"method: {{name: '{own}:Mine', settings: {{depth: 4}}}}")
    config = parse("--config", "configs/tiny-wan.yaml", "--config", str(preset), "--method.settings.form", "round")
    made = config.method.method
    assert (type(made).__name__, made.depth, made.form) == ("Mine", 4, "round")
    assert parse("--method.name", f"{own}:Mine").method.method.depth == 1


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (
            "Mine",
            ["--method.settings.dept", "2"],
            r"does not know 'dept' \(did you mean 'depth'\?\); it has the settings",
        ),
        ("Mein", [], r"has no 'Mein' \(did you mean 'Mine'\?\)"),
        ("Stranger", [], "Stranger is not a subclass of freespec.methods.Method"),
        ("Unfinished", [], "cannot be made: TypeError: Can't instantiate abstract class Unfinished with .* plan'?$"),
        ("", [], "or a class of your own as package.module:Class"),
    ],
)
def test_mistakes_with_it(own: str, name: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        parse("--method.name", f"{own}:{name}", *words)
    assert "\n" not in str(raised.value)


def test_settings_that_no_record_can_hold(own: str) -> None:
    with pytest.raises(UserError, match=r"method.settings must be numbers, words, lists and maps: .* date is not JSON"):
        MethodConfig(name=f"{own}:Mine", window_frames=3, settings={"depth": datetime.date(2020, 1, 1)})


def test_modules_that_do_not_import(own: str) -> None:
    with pytest.raises(UserError, match=r"cannot import 'no_such_module' from .* or Python's path"):
        parse("--method.name", "no_such_module:Mine")
    with pytest.raises(UserError, match=f"'{own}_broken' does not import: SyntaxError: invalid syntax"):
        parse("--method.name", f"{own}_broken:Mine")


def test_unused_settings() -> None:
    with pytest.raises(
        UserError, match=r"method.settings are for a class of your own; those of freelong are method.freelong.\*"
    ):
        parse("--method.name", "freelong", "--method.settings.taps", "11")
    with pytest.raises(UserError, match=r"those of direct are none"):
        parse("--method.name", "direct", "--method.settings.taps", "11")


def test_settings_of_every_method_of_the_repository_are_read() -> None:
    """Or those of one that is added would be taken and change nothing."""
    config = parse("--config", "configs/tiny-wan.yaml").method
    with_settings = {name for name in METHODS if dataclasses.fields(make_method(name))}
    assert with_settings == set(config._groups)
    for name in with_settings:
        assert dataclasses.replace(config, name=name).method is getattr(config, name)


def test_prompts_of_vbench_fit_and_wan_s_negative_prompt_names_stillness() -> None:
    assert parse("--config", "configs/ltx-video-2b.yaml").sampler.max_text_tokens == 256
    for size in ("1.3b", "14b"):
        sampler = parse("--config", f"configs/wan2.1-t2v-{size}.yaml").sampler
        assert sampler.max_text_tokens == 512
        assert sampler.guidance_scale > 1
        assert "\n" not in sampler.negative_prompt
        for word in ("static", "still", "blurred", "overexposed", "malformed", "subtitles", "low quality"):
            assert word in sampler.negative_prompt
