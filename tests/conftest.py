from __future__ import annotations

import os

# pytest -n 3 keeps two cores busy, for some tests wait; more threads would only wait for each other. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
