"""Recognising network file systems from a mount table as the kernel writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rksp_monitor import filesystem
from rksp_monitor.filesystem import describe, filesystem_of, is_remote
from rksp_monitor.remote import as_path

MOUNTS = r"""
overlay / overlay rw,relatime 0 0
proc /proc proc rw 0 0
server:/export /data nfs4 rw,vers=4.2 0 0
/dev/sdb1 /data/local ext4 rw 0 0
server:/share /data/with\040space\134 cifs rw 0 0
gcsfuse /buckets/one fuse.gcsfuse rw 0 0
juice /buckets/two fuse.juicefs rw 0 0
overlay /containers fuse.fuse-overlayfs rw 0 0
/dev/sdc1 /ntfs fuseblk rw 0 0
lustre@tcp:/scratch /scratch lustre rw 0 0
tmpfs /scratch/tmp tmpfs rw 0 0
/dev/sdd1 /twice ext4 rw 0 0
server:/export /twice nfs rw 0 0
"""


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text(MOUNTS.lstrip())
    monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "mounts")


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize(
    ("folder", "kind", "remote"),
    [
        ("/home/user", "overlay", False),
        ("/data", "nfs4", True),
        ("/data/runs/of/mine", "nfs4", True),
        ("/data/local/run", "ext4", False),
        ("/data/with space\\/run", "cifs", True),
        ("/database", "overlay", False),
        ("/buckets/one/run", "fuse.gcsfuse", True),
        ("/buckets/two/run", "fuse.juicefs", True),
        ("/containers/run", "fuse.fuse-overlayfs", False),
        ("/ntfs/run", "fuseblk", False),
        ("/scratch/run", "lustre", True),
        ("/scratch/tmp", "tmpfs", False),
        ("/twice/run", "nfs", True),  # mounted over
    ],
)
def test_the_innermost_mount_counts(folder: str, kind: str, remote: bool):
    assert filesystem_of(Path(folder)) == kind
    assert is_remote(Path(folder)) is remote
    assert describe(Path(folder)).startswith(kind)
    assert ("polling" in describe(Path(folder))) is remote


def test_a_machine_without_a_mount_table_has_unknown_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "none")
    assert (filesystem_of(tmp_path), is_remote(tmp_path)) == ("", False)
    assert describe(tmp_path) == "an unknown file system"


def test_an_object_store_is_remote():
    assert is_remote(as_path("memory://bucket/run"))
    assert "polling" in describe(as_path("memory://bucket/run"))
