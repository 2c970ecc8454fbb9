"""The error of a user's mistake, which commands print as one line and nothing else."""


class UserError(ValueError):
    """What is wrong, with the numbers, and what to do; never a fault of the program itself."""
