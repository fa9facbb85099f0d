"""The interval of a share, for who reads numbers without NumPy."""

import math

Z = 1.959964  # of the normal distribution: 95 % lie within


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval of a share of `count` (Wilson, 1927): sane near 0 and 1, and for few."""
    if not count:
        return 0.0, 1.0
    middle = share + Z * Z / (2 * count)
    half = Z * math.sqrt((share * (1 - share) + Z * Z / (4 * count)) / count)
    whole = 1 + Z * Z / count
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)
