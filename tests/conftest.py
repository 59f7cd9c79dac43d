"""How many random examples the property tests try: few by default, more with `--hypothesis-profile many`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

QUIET = [HealthCheck.filter_too_much, HealthCheck.too_slow]
settings.register_profile("few", max_examples=120, deadline=None, derandomize=True, suppress_health_check=QUIET)
settings.register_profile("many", max_examples=5000, deadline=None, suppress_health_check=QUIET)
settings.load_profile("few")
