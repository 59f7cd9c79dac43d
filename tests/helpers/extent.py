"""How much the tests try (`EVERY`): all of their cases with `RMSNORM_TESTS=all`, otherwise a choice of them."""

from __future__ import annotations

import os

EVERY = os.environ.get("RMSNORM_TESTS") == "all"
