"""Run folders that are no local folder: ``s3://bucket/run`` and whatever else fsspec knows."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from rksp_core.errors import ConfigError, RkspError

# Where an object appears whole or not at all; sftp, smb, hdfs and the like are written bit by bit.
OBJECT_STORES = frozenset(
    {"abfs", "abfss", "az", "cos", "gcs", "gs", "hf", "memory", "oci", "oss", "s3", "s3a", "tos", "wandb"}
)

_WORD = r"[A-Za-z][A-Za-z0-9+.-]*"
_SCHEME = re.compile(rf"({_WORD}(?:::{_WORD})*)://")


def as_path(text: str | Path) -> Path:
    """Return the path that a setting, a flag or a ledger row names; nothing is connected to.

    Plain text and ``file://`` give a local Path. Any other ``scheme://`` gives a `upath.UPath`, which answers as a
    Path does (for `isinstance` it is none: `is_local`). ``as_path(str(path))`` is the same path again.

    Raises
    ------
    ConfigError
        When the scheme is unknown, or its driver is not installed: the message names the package; or when a
        ``file://`` names another machine.
    """
    if not isinstance(text, str):
        return text
    found = _SCHEME.match(text)
    if found is None:
        return Path(text)
    if found[1].lower() in ("file", "local"):
        host, _, place = text[found.end() :].partition("/")
        if host not in ("", "localhost"):
            raise ConfigError(f"{text} names a machine, {host}; a folder of this one is file:///{host}/{place}")
        return Path("/", unquote(place))
    from fsspec import available_protocols, get_filesystem_class  # type: ignore[import-untyped]
    from upath import UPath

    for scheme in found[1].split("::"):
        try:
            get_filesystem_class(scheme)
        except ImportError as error:  # fsspec's words name the package: "Install s3fs to access S3"
            raise ConfigError(f"{text} needs a package that is not installed: {error}") from error
        except ValueError as error:
            near = get_close_matches(scheme, available_protocols(), 1, 0.0)[0]
            raise ConfigError(f"{text}: there is no {scheme}://; did you mean {near}://?") from error
    # No listings cache: a remembered listing would not show what the trainer wrote since.
    return cast("Path", UPath(text, use_listings_cache=False))


def is_local(path: object) -> bool:
    """Whether the path is one of this machine, which `os` and `mmap` understand."""
    return isinstance(path, Path)


def appears_whole(path: Path) -> bool:
    """Whether what lies there was put there in one piece, so that nobody can see half of it."""
    return not is_local(path) and cast("Any", path).protocol in OBJECT_STORES


@contextlib.contextmanager
def driver_errors(path: Path) -> Iterator[None]:
    """Turn whatever the driver of a remote path raises into OSError, as a local path would: try it again later.

    Drivers raise errors of their own libraries (botocore, aiohttp, paramiko) beside OSError.
    """
    try:
        yield
    except (OSError, RkspError):
        raise
    except Exception as error:
        if is_local(path):
            raise
        first = " ".join(str(error).split())[:200]
        raise OSError(f"{path} cannot be reached ({type(error).__name__}: {first})") from error
