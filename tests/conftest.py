"""Settings of the whole suite."""

import hypothesis

# examples are the same on every machine, and a slow machine is no failure
hypothesis.settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], max_examples=50
)
hypothesis.settings.load_profile("suite")
