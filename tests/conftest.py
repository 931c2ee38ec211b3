from __future__ import annotations

import os

# pytest -n 2 keeps both cores busy; more threads would only wait for each other. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
