"""Two sets of images compared through their features: distances, manifolds, memorisation, each with its interval.

Everything here is a function of numpy arrays. Where a matrix product decides bits, it runs in one thread, so that
results do not depend on how many a machine has.
"""

NUM_GROUPS = 10
"""Into which the images of a side are dealt, and of which the jackknife leaves out one at a time."""


def fewest_images(num_features: int, num_groups: int = NUM_GROUPS) -> int:
    """The least number of images whose covariance can have full rank without any one of their groups.

    >>> fewest_images(64)
    73
    """
    return -(-(num_features + 1) * num_groups // (num_groups - 1))
