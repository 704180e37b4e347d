"""A number with its interval."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Estimate:
    """A number with its percentile interval.

    Attributes:
        value: The estimate from the measured data.
        low: Lower end of the interval; NaN if undefined.
        high: Upper end.

    Example:
        >>> str(Estimate(0.05, 0.031, 0.0689))
        '0.050 [0.031, 0.069]'
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(value: float, replicates: ArrayLike, *, level: float = 0.95) -> Estimate:
    """A measured value with the percentile interval of its replicates.

    Args:
        value: The measured value.
        replicates: Its bootstrap replicates, any shape; NaN ones are left out.
        level: Share of the replicates inside the interval, in (0, 1).

    Returns:
        The estimate.

    Example:
        >>> str(interval(0.5, np.linspace(0, 1, 101), level=0.9))
        '0.500 [0.050, 0.950]'
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie in (0, 1), got {level}. Use 0.95 for a 95% interval.")
    numbers = np.asarray(replicates, dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    if numbers.size == 0:
        return Estimate(float(value), float("nan"), float("nan"))
    low, high = np.quantile(numbers, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high))
