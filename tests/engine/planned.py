"""`plan` and `choose` for the arguments of a case."""

from typing import Any

from engine.config import MethodConfig, SamplerConfig, VideoConfig
from engine.planner import choose as chooser
from engine.planner import plan as planner
from engine.planner.model import ModelSpec
from engine.planner.plan import Case, Plan
from engine.planner.providers import FixedDegrees


def plan(spec: ModelSpec, video: VideoConfig, sampler: SamplerConfig, method: MethodConfig, **more: Any) -> list[Plan]:
    """Every plan, best first; `more` are the other fields of the case."""
    return planner.plan(Case(spec=spec, video=video, sampler=sampler, method=method, **more))


def choose(
    spec: ModelSpec,
    video: VideoConfig,
    sampler: SamplerConfig,
    method: MethodConfig,
    *,
    fixed: FixedDegrees = (None, None, None),
    **more: Any,
) -> Plan:
    """The plan that is chosen of those that keep the fixed degrees."""
    return chooser.choose(Case(spec=spec, video=video, sampler=sampler, method=method, **more), fixed)
