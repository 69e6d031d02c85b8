"""Bounds on and values of an image's likelihood, in bits per dimension, and how sure their means are."""

GIVEN_LABEL = "given_label."
"""Begins the name of a bound of -log2 p(x | c)."""


def untold_name(bound: str) -> str:
    """The name of the same bound where the label is not told."""
    return bound.removeprefix(GIVEN_LABEL)
