"""python -m tests.cluster.bench: an array of 16 trainings on two nodes of one core, against the same on one node."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster import cluster

MODELS, STEPS = 16, 100
IDEAL = 0.85
"""Share of twice the speed that is wanted."""


def seconds(nodes: int) -> float:
    """Wall time of the array, from the first task's start to the last model's end: what is around is Python and SLURM waking up."""
    with tempfile.TemporaryDirectory() as out:
        small = ["cluster=slurm", "cluster.cpus=1", "cluster.memory_gb=null", f"cluster.parallel={nodes}", "tracking=none"]
        work = ["debug=quick", "attack=lira", f"split.n_models={MODELS}", "stage=train", f"training.steps={STEPS}", "evaluation=bare"]
        line = [sys.executable, "run.py", *small, *work, "training.batch_size=32", f"output_dir={out}"]
        process = subprocess.Popen(line, cwd=cluster.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = None
        while process.poll() is None:
            if begun is None and cluster.call("squeue", "-h", "-t", "RUNNING"):
                begun = time.time()
            time.sleep(0.2)
        assert process.returncode == 0
        ends = [done.stat().st_mtime for done in Path(out).glob("models/*/DONE")]
        assert len(ends) == MODELS
        assert begun is not None
        return max(ends) - begun


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(cluster.ROOT), **cluster.ENVIRONMENT}
    cluster.up()
    try:
        one, two = seconds(1), seconds(2)
    finally:
        cluster.down()
    share = one / two / 2
    print(f"{MODELS} trainings of {STEPS} steps: {one:.0f} s on one node, {two:.0f} s on two: {share:.0%} of ideal (>= {IDEAL:.0%})")
    sys.exit(0 if share >= IDEAL else 1)
