"""How much the tests try: all with `RMSNORM_TESTS=all` (`EVERY`), else a choice of cases, and no `slow` ones."""

from __future__ import annotations

import os

import pytest

EVERY = os.environ.get("RMSNORM_TESTS") == "all"
slow = pytest.mark.skipif(not EVERY, reason="takes long: set RMSNORM_TESTS=all")
