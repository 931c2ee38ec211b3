"""`python run.py ..` as a process of its own, forked from one that has imported the libraries: the same, without those seconds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
# On one thread, without GPU or network; the server's, since libraries read some of them when they are imported.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": os.path.join(tempfile.gettempdir(), "no-hub-cache")}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["diffmia_exp.pipeline", "diffmia_exp.lit", "diffmia_exp.figures", "diffusers", "datasets", "wandb"])


def start(
    *arguments: str, out: Path | str = os.devnull, err: Path | str = os.devnull, largest_file: int | None = None
) -> ForkServerProcess:
    """`python run.py <arguments>` in the repository, in the environment of now, writing into two files."""
    process = _context.Process(target=_run_py, args=(arguments, str(out), str(err), dict(os.environ), largest_file))
    process.start()
    return process


def run(*arguments: str, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    """The same, waited for. Nothing can be written past `largest_file` bytes of a file: it fails with EFBIG."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as readers:
        pipes = [Path(folder, name) for name in ("out", "err")]  # which have no size
        for pipe in pipes:
            os.mkfifo(pipe)
        process = start(*arguments, out=pipes[0], err=pipes[1], largest_file=largest_file)
        written = readers.map(Path.read_text, pipes)
        process.join(300)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, *written)


def _run_py(arguments: tuple[str, ...], out: str, err: str, environment: dict[str, str], largest_file: int | None) -> None:
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background processes ignore
    os.chdir(ROOT)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["run.py", *arguments]
    runpy.run_path("run.py", run_name="__main__")
