"""Tests run beside each other, a process a core (pytest-xdist); `-n 0` runs them in one."""

import os

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:  # torch reads this once
    os.environ.setdefault("OMP_NUM_THREADS", "1")
