"""Degrees, memory and time of a run before any weight is read: `plan.plan` lists the possible layouts, `choose.choose` takes the best.

All times are predictions from a GPU's datasheet and assumed fractions of its peaks.
"""
