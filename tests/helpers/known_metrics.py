"""Metrics that can only be asked for by names that stand in the table."""

import step3_ppo.measures  # noqa: F401  step 3's rows
from utils import metrics


class KnownMetrics(dict):
    """Raises KeyError where a name without a row is looked up, in whatever way."""

    def __getitem__(self, name):
        metrics.check([name])
        return super().__getitem__(name)

    def __contains__(self, name):
        metrics.check([name])
        return super().__contains__(name)

    def get(self, name, default=None):
        metrics.check([name])
        return super().get(name, default)
