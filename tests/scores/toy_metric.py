"""An example of a metric. Copy it to ddpm/scores/mean_distance.py, and add MEAN_DISTANCE to ROWS of ddpm/scores/metrics.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ddpm.scores.metric import Metric

if TYPE_CHECKING:
    from ddpm.scores.fidelity import Sets


def _measure(sets: Sets) -> float:
    """Returns the distance between the mean features of the samples and those of the reference images."""
    return float(np.linalg.norm(sets.fake.mean(0) - sets.real.mean(0)))


MEAN_DISTANCE = Metric("mean_distance", "distance of means", _measure, low=0, direction=-1)
