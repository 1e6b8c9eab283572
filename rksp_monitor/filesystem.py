"""Which file system a folder is on: SQLite's locks and file events cannot be trusted on some."""

from __future__ import annotations

import re
from pathlib import Path

from rksp_monitor.remote import is_local

MOUNTS = Path("/proc/self/mounts")

# Other machines write these, and tell nobody here.
REMOTE = frozenset(
    {
        "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "glusterfs", "gpfs", "lustre", "nfs", "nfs4",
        "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs",
    }
)  # fmt: skip

# FUSE in general is a program that may fetch files from anywhere (sshfs, s3fs, gcsfuse, JuiceFS); these do not.
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.overlayfs", "fuse.mergerfs", "fuse.bindfs", "fuse.lxcfs"})


def filesystem_of(folder: Path) -> str:
    """Return the type of the file system that holds the folder, as Linux names it; "" where that is unknown."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    real = folder.resolve()
    mounts = {Path(_unescaped(fields[1])): fields[2] for line in lines if len(fields := line.split(" ")) > 2}
    return next((mounts[parent] for parent in (real, *real.parents) if parent in mounts), "")


def is_remote(folder: Path) -> bool:
    """Whether other machines may write the folder without this one being told: NFS, CIFS, FUSE, an object store."""
    if not is_local(folder):
        return True
    kind = filesystem_of(folder)
    return kind in REMOTE or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)


def describe(folder: Path) -> str:
    """Return what can be said of the folder's file system in a sentence."""
    if not is_local(folder):
        return "remote, without file events: polling finds what is written"
    kind = filesystem_of(folder) or "an unknown file system"
    if is_remote(folder):
        return f"{kind}, where other machines write without file events: polling finds what is written"
    return kind


def _unescaped(place: str) -> str:
    r"""Undo the kernel's ``\040`` for a space, ``\134`` for a backslash, and so on."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)
