"""How hypothesis tries things in these tests: the same examples in every run."""

from hypothesis import HealthCheck, settings

NO_PROCESS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
