"""For every test: no network, and no warning from tokenizers about forks."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One cache of preflights for a run: the workers of pytest-xdist inherit it.
if "ADAPTRIX_EXPORT_CACHE" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="adaptrix-cache-")
    os.environ["ADAPTRIX_EXPORT_CACHE"] = _cache
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

# The same examples on every machine, and no verdict from how busy it is.
settings.register_profile(
    "steady",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("steady")
