"""Hypothesis profiles. `HYPOTHESIS_PROFILE` names the one that tests run under; `--hypothesis-seed` of pytest replays a run."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=_QUIET, database=None)
settings.register_profile("deep", max_examples=1000, deadline=None, suppress_health_check=_QUIET, print_blob=True)
settings.register_profile("fuzz", settings.get_profile("deep"), max_examples=10_000_000, database=None)
DEEP = os.environ.get("HYPOTHESIS_PROFILE", "ci") != "ci"
"""Whether this run takes its time."""

settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

FUZZ = settings(settings.get_profile("fuzz"), suppress_health_check=list(HealthCheck), phases=(Phase.reuse, Phase.shrink))
"""Of the fuzzer, which makes its own examples: what failed is tried again and made smaller."""
