"""A real Slurm of one node on 127.0.0.1: munged, slurmctld, slurmd, in one folder, on free ports."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tests.deploy.processes import PATH, daemon, free_port, run, wait_until

CONFIG = """
ClusterName=rksp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MinJobAge=300
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES State=UP
"""


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run the cluster; yields the environment that makes sbatch and scontrol use it."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    config = folder / "slurm.conf"
    controller_port, node_port = free_port(), free_port()
    config.write_text(
        CONFIG.format(folder=folder, host=host, controller_port=controller_port, node_port=node_port), encoding="utf-8"
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": PATH}
    munge = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    commands = (
        ["munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", host],
    )
    with contextlib.ExitStack() as stack:
        for command in commands:
            stack.enter_context(daemon(command, environment, folder / f"{command[0]}.out"))
            time.sleep(0.3)  # each needs the socket of the one before
        wait_until(lambda: "idle" in run(["sinfo", "-h", "-o", "%T"], environment), 20, "the node does not become idle")
        yield environment


def submit(arguments: list[str], environment: dict[str, str], folder: Path) -> str:
    """Submit a batch script from ``folder`` and return the job's number; its output goes into job-NUMBER.out."""
    return run(["sbatch", "--parsable", "--output=job-%j.out", *arguments], environment, folder).strip()


def result(job: str, environment: dict[str, str], folder: Path) -> tuple[int, str]:
    """Wait for the end of a job, and return its exit code and what it wrote."""
    going = ("PENDING", "RUNNING", "COMPLETING")
    wait_until(lambda: _state(job, environment)[0] not in going, 120, f"job {job} does not end")
    return _state(job, environment)[1], (folder / f"job-{job}.out").read_text(encoding="utf-8")


def _state(job: str, environment: dict[str, str]) -> tuple[str, int]:
    """Return Slurm's state of a job and its exit code."""
    shown = run(["scontrol", "show", "job", job], environment)
    word, code = re.search(r"JobState=(\w+)", shown), re.search(r"ExitCode=(\d+):", shown)
    assert word
    assert code
    return word[1], int(code[1])
