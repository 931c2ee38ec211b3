"""A SLURM cluster of two nodes on this machine: python -m tests.cluster.cluster up | down.

slurmctld, two slurmd and munge, from Debian's packages, all in one folder under /tmp, as root. Nothing below /etc is touched, and
no other SLURM or munge on this machine: what belongs to this cluster are the processes whose ids are in its folder.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = Path(os.environ.get("DIFFMIA_CLUSTER", "/tmp/diffmia-cluster"))
NODES = ("n1", "n2")
CONF = """\
ClusterName=diffmia
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
StateSaveLocation={home}/state
SlurmctldPidFile={home}/slurmctld.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdPidFile={home}/%n.pid
SlurmdLogFile={home}/%n.log
SlurmdSpoolDir={home}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdTimeout=6
SlurmctldTimeout=6
KillWait=4
MinJobAge=60
SchedulerParameters=sched_interval=2,batch_sched_delay=1,bf_interval=2
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=1 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
ENVIRONMENT = {"SLURM_CONF": str(HOME / "slurm.conf")}
"""What a process needs to talk to it."""

NEEDED = ("slurmctld", "slurmd", "munged", "scontrol")


def up() -> None:
    """Start it, and wait until both nodes are idle.

    Raises:
        SystemExit: if a program is missing or something does not start.
    """
    if missing := [program for program in NEEDED if shutil.which(program, path=_path()) is None]:
        sys.exit(f"{' '.join(missing)} missing: apt-get install slurmctld slurmd slurm-client munge")
    down()
    for folder in (HOME, HOME / "state", *(HOME / f"spool-{node}" for node in NODES)):
        folder.mkdir(parents=True, mode=0o755)
    (HOME / "slurm.conf").write_text(CONF.format(home=HOME, host=socket.gethostname().split(".")[0]))
    key = HOME / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
    _run("munged", "--force", *(f"--{option}={HOME / name}" for option, name in files.items()))
    _run("slurmctld", "-c")
    for node in NODES:
        start(node)
    wait_for(idle, 30, "nodes are not idle")


def start(node: str) -> None:
    """Start a node, anew if it had died."""
    _run("slurmd", "-N", node)


def idle() -> bool:
    """Whether both nodes wait for work."""
    return call("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES)


def call(*command: str) -> str:
    """The output of a SLURM command; empty if it fails."""
    return subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True).stdout


def wait_for(true: object, seconds: float, otherwise: str) -> None:
    """Wait until `true()`; exits with a message when the time is up."""
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in HOME.glob("*.log"))
            raise SystemExit(f"the cluster fails: {otherwise}\n{logs}")
        time.sleep(0.2)


def fail(node: str) -> None:
    """Let a node die: its daemon, and all that runs on it."""
    daemon = int((HOME / f"{node}.pid").read_text())
    os.kill(daemon, signal.SIGKILL)
    for pid in _belonging(f"SLURMD_NODENAME={node}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _belonging(mark: str) -> list[int]:
    """Processes of this cluster with a variable in their environment, and the step daemons above them."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            variables = environment.read_bytes().decode(errors="replace").split("\0")
            if mark in variables and f"SLURM_CONF={HOME / 'slurm.conf'}" in variables:
                pid = int(environment.parent.name)
                parent = int((environment.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
                above = Path(f"/proc/{parent}/comm").read_text().strip()
                found += [parent, pid] if above == "slurmstepd" else [pid]
    return found


def down() -> None:
    """Stop it and remove its folder."""
    if HOME.exists():
        call("scancel", "--user", getpass.getuser())
        names = ("slurmctld", *NODES, "munged")
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                pid = int((HOME / f"{name}.pid").read_text())
                if Path(f"/proc/{pid}/comm").read_text().strip() in ("slurmctld", "slurmd", "munged"):
                    os.kill(pid, signal.SIGKILL if name in NODES else signal.SIGTERM)
        for node in NODES:
            for pid in _belonging(f"SLURMD_NODENAME={node}"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        shutil.rmtree(HOME, ignore_errors=True)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _run(program: str, *arguments: str) -> None:
    found = shutil.which(program, path=_path())
    assert found is not None
    done = subprocess.run([found, *arguments], env=os.environ | ENVIRONMENT | {"PATH": _path()}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program} does not start: {done.stderr}")


if __name__ == "__main__":
    if sys.argv[1:] == ["up"]:
        up()
        print(f"two nodes are idle; to use them: export SLURM_CONF={ENVIRONMENT['SLURM_CONF']}")
    elif sys.argv[1:] == ["down"]:
        down()
    else:
        sys.exit(__doc__)
