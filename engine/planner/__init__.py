"""Degrees, memory and time of a run before any weight is read: `plan` lists what is possible, `choose` takes the best.

Every second that comes out of here is predicted, from the datasheet of a GPU and assumed fractions of it.
"""

from engine.planner.choose import choose
from engine.planner.gpu import GpuSpec, read_gpu
from engine.planner.model import ModelSpec, read_model
from engine.planner.plan import Options, Plan, plan
from engine.planner.table import predicted_table

__all__ = [
    "GpuSpec",
    "ModelSpec",
    "Options",
    "Plan",
    "choose",
    "plan",
    "predicted_table",
    "read_gpu",
    "read_model",
]
