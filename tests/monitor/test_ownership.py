"""Who is the owner: one at a time, and nobody once its process is gone, however it went."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rksp_core.control import ControlWriter
from rksp_core.errors import ConfigError
from rksp_monitor.orders import sole_orderer
from rksp_monitor.ownership import Owned, owned, owner_of

OWNING = """
import sys, time
from pathlib import Path
from rksp_monitor.ownership import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(60)
"""


def test_a_second_one_is_told_who_is_first_and_a_killed_one_blocks_nobody(tmp_path: Path):
    path = tmp_path / "watcher"
    process = subprocess.Popen([sys.executable, "-c", OWNING, str(path)], stdout=subprocess.PIPE, text=True)
    first = f"process {process.pid} on {socket.gethostname()}"
    try:
        assert process.stdout.readline() == "owned\n"
        assert owner_of(path) == (first, True)
        with pytest.raises(Owned, match=first), owned(path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert owner_of(path) == (first, False), "what it left"
    with owned(path):
        assert owner_of(path) == (f"process {os.getpid()} on {socket.gethostname()}", True)
    assert owner_of(path) == ("", False)


def test_of_another_host_nothing_is_known(tmp_path: Path):
    (tmp_path / "watcher.owner").write_text("process 1 on elsewhere\n")
    assert owner_of(tmp_path / "watcher") == ("process 1 on elsewhere", None)


def test_a_file_system_without_locks_is_said_and_lets_several_give_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Lustre, mounted without ``flock``: a file instead of a lock would outlive whoever was killed."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="not implemented"), owned(tmp_path / "watcher"):
        pass
    (tmp_path / "watcher.lock").write_text("1\nelsewhere\n")
    control = ControlWriter(tmp_path)
    with sole_orderer(control), sole_orderer(control):
        pass


def test_the_lock_of_another_user_is_held_as_long_as_its_owner_lives():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own lets nobody else in
        Path(folder).chmod(0o777)
        control = ControlWriter(folder)
        with sole_orderer(control):
            (control.folder / "watcher.lock").chmod(0)
            try:
                if user == 0:
                    os.seteuid(65534)  # root may open everything
                with pytest.raises(ConfigError, match=f"orders from process {os.getpid()} on"), sole_orderer(control):
                    pass
                (control.folder / "watcher.owner").rename(control.folder / "of a killed one")
                with sole_orderer(control):
                    pass
            finally:
                os.seteuid(user)


def test_a_group_that_shares_the_control_folder_shares_its_lock(tmp_path: Path):
    control = ControlWriter(tmp_path / "control", mode=0o640)
    with sole_orderer(control):
        assert (tmp_path / "control" / "watcher.lock").stat().st_mode & 0o777 == 0o660
        with pytest.raises(ConfigError, match=r"let one of the two observe"), sole_orderer(control):
            pass


def test_a_control_folder_that_cannot_be_made_is_no_reason_not_to_watch(tmp_path: Path):
    (tmp_path / "file").touch()
    with sole_orderer(ControlWriter(tmp_path / "file" / "control")):
        pass
