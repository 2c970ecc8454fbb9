"""Degrees, memory and time of a run before any weight is read: `plan.plan` lists what is possible, `choose.choose` takes the best.

Every second that comes out of here is predicted, from the datasheet of a GPU and assumed fractions of it.
"""
