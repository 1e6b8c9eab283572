"""TLS and basic auth of the endpoint, in the ``web.config.file`` schema of Prometheus' exporter-toolkit.

    tls_server_config:
      cert_file: server.crt          # relative to this file
      key_file: server.key
    basic_auth_users:
      prometheus: $2y$10$...         # htpasswd -nBC 10 prometheus

A key that Python's ``ssl`` cannot honour is refused rather than ignored, since each of them tightens access:
client certificates that are asked for and not verified, lists of curves, HTTP/2, certificates inside the YAML.
Source: https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md.
"""

from __future__ import annotations

import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from rksp_core.errors import ConfigError

# What exporter-toolkit knows and Python's ssl, or this endpoint, does not: key -> what to do instead.
UNSUPPORTED = {
    "tls_server_config.cert": "name a file with cert_file",
    "tls_server_config.key": "name a file with key_file",
    "tls_server_config.client_ca": "name a file with client_ca_file",
    "tls_server_config.client_allowed_sans": "sign the clients you allow with a CA of their own in client_ca_file",
    "tls_server_config.curve_preferences": "leave it out: OpenSSL's own choice is taken",
    "rate_limit": "leave it out: the endpoint bounds its connections itself",
}
KNOWN: Mapping[str, tuple[str, ...]] = {
    "": ("tls_server_config", "http_server_config", "basic_auth_users"),
    "tls_server_config": (
        "cert_file",
        "key_file",
        "client_auth_type",
        "client_ca_file",
        "min_version",
        "max_version",
        "cipher_suites",
        "prefer_server_cipher_suites",
    ),
    "http_server_config": ("http2", "headers"),
    "http_server_config.headers": (
        "Content-Security-Policy",
        "Strict-Transport-Security",
        "X-Content-Type-Options",
        "X-Frame-Options",
        "X-XSS-Protection",
    ),
}
CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}  # older ones are deprecated by RFC 8996
# Go's names of the suites of TLS 1.2 that it calls secure; those of TLS 1.3 cannot be chosen, in Go or in Python.
CIPHERS = {
    f"TLS_ECDHE_{key}_WITH_{cipher}": f"ECDHE-{key}-{name}"
    for key in ("ECDSA", "RSA")
    for cipher, name in (
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"),
        ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"),
    )
}
ALWAYS_ON = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")

BCRYPT = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")
RETRY_DELAY = 5.0  # seconds between two readings of a file that cannot be used

LARGEST_COST = 14  # 2^14 rounds take about a second: a costlier hash would hold up every first login


@dataclass(frozen=True)
class Rules:
    """One reading of the file: what every connection made from now on is held to."""

    context: ssl.SSLContext | None  # None: no TLS
    users: Mapping[str, bytes]  # name -> bcrypt hash; empty: nobody is asked
    headers: tuple[tuple[str, str], ...]  # added to every answer


OPEN = Rules(None, {}, ())


class WebConfig:
    """The file, read again when it or a file that it names changes.

    Parameters
    ----------
    path
        The YAML file; paths in it are relative to its folder.
    warn
        Told once about a changed file that cannot be used; the rules that held go on holding.

    Raises
    ------
    ConfigError
        When the file cannot be used: one sentence, never with a password or hash in it.
    """

    def __init__(self, path: Path, warn: Callable[[str], object]) -> None:
        self._path, self._warn = path, warn
        self._lock = threading.Lock()
        # Looked at before reading, so that a change meanwhile is seen; that the files named in it were not looked at
        # has the whole read once more.
        self._seen = _look((path,))
        self._rules, self._files = _read(path)
        self._problem, self._again = "", 0.0

    def rules(self) -> Rules:
        """Return the rules that hold now. Whoever comes while another reads the changed file gets the old ones."""
        if self._lock.acquire(blocking=False):
            try:
                self._refresh()
            finally:
                self._lock.release()
        return self._rules

    def _refresh(self) -> None:
        seen = _look(self._files)
        # After a failure also without a change: what was missing may be a file that only the new YAML names.
        if seen == self._seen and not (self._problem and time.monotonic() > self._again):
            return
        self._seen = seen
        try:
            rules, files = _read(self._path)
            # A file caught while it is rewritten may be empty for a moment: that must not open the door.
            for part, had, has in (
                ("tls_server_config", self._rules.context, rules.context),
                ("basic_auth_users", self._rules.users, rules.users),
            ):
                if had and not has:
                    raise ConfigError(f"{self._path} no longer has {part}; restart to serve without it")
        except ConfigError as error:
            if str(error) != self._problem:
                self._warn(f"{error} (the rules read before still hold)")
            self._problem, self._again = str(error), time.monotonic() + RETRY_DELAY
        else:
            self._rules, self._files, self._problem = rules, files, ""


def _look(files: tuple[Path, ...]) -> tuple[tuple[int, int, int] | None, ...]:
    """Return what tells a change of each file; None for one that is not there."""
    found: list[tuple[int, int, int] | None] = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def _read(path: Path) -> tuple[Rules, tuple[Path, ...]]:
    """Return the rules, and every file that they were read from, the YAML first."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the web configuration {path} ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # without the text itself, which holds hashes
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path} is no YAML{f' (line {mark.line + 1})' if mark else ''}") from None
    try:
        document = _section(document, "")
        context, files = _tls(_section(document.get("tls_server_config"), "tls_server_config"), path.parent)
        headers = _headers(_section(document.get("http_server_config"), "http_server_config"))
        return Rules(context, _users(document.get("basic_auth_users")), headers), (path, *files)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error.__cause__


def _section(value: Any, name: str) -> dict[str, Any]:
    """Return a mapping of known keys; a section that is left out is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name or 'the file'} must be a mapping, got a {type(value).__name__}")
    for key in value:
        full = f"{name}.{key}" if name else str(key)
        if full in UNSUPPORTED:
            raise ConfigError(f"{full} is not supported here; {UNSUPPORTED[full]}")
        if key not in KNOWN[name]:
            raise ConfigError(f"unknown key {full!r}; did you mean {_nearest(key, KNOWN[name])!r}?")
    return value


def _nearest(name: object, known: Iterable[str]) -> str:
    return get_close_matches(str(name), list(known), 1, 0.0)[0]


def _choose(value: object, known: Mapping[str, Any], name: str) -> Any:
    if not isinstance(value, str) or value not in known:
        near = _nearest(value, known)
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}; did you mean {near!r}?")
    return known[value]


def _tls(section: Mapping[str, Any], folder: Path) -> tuple[ssl.SSLContext | None, tuple[Path, ...]]:
    if not section:
        return None, ()
    names = ("cert_file", "key_file", "client_ca_file")
    files = {name: folder / str(section[name]) for name in names if section.get(name)}
    if "cert_file" not in files or "key_file" not in files:
        raise ConfigError("tls_server_config needs both cert_file and key_file")
    verify = _choose(section.get("client_auth_type") or "NoClientCert", CLIENT_AUTH, "client_auth_type")
    if (verify != ssl.CERT_NONE) != ("client_ca_file" in files):
        raise ConfigError(
            "client_ca_file and a client_auth_type that verifies (VerifyClientCertIfGiven, RequireAndVerifyClientCert) "
            "need each other"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _choose(section.get("min_version") or "TLS12", VERSIONS, "min_version")
    context.maximum_version = _choose(section.get("max_version") or "TLS13", VERSIONS, "max_version")
    if context.minimum_version > context.maximum_version:
        raise ConfigError("min_version is above max_version")
    suites = section.get("cipher_suites") or []
    if not isinstance(suites, list):
        raise ConfigError(f"cipher_suites must be a list, got a {type(suites).__name__}")
    chosen = [_choose(suite, CIPHERS | dict.fromkeys(ALWAYS_ON), "cipher_suites") for suite in suites]
    if any(chosen):
        context.set_ciphers(":".join(filter(None, chosen)))
    if _boolean(section, "prefer_server_cipher_suites", default=True):
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    else:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    for name, load in (
        ("cert_file", lambda: context.load_cert_chain(files["cert_file"], files["key_file"], password=_no_password)),
        ("client_ca_file", lambda: context.load_verify_locations(files["client_ca_file"])),
    ):
        if name in files:
            _load(files, name, load)
    context.verify_mode = verify
    return context, tuple(files.values())


def _load(files: Mapping[str, Path], name: str, load: Callable[[], None]) -> None:
    for file in (files[name], files["key_file"]) if name == "cert_file" else (files[name],):
        try:
            file.open("rb").close()
        except OSError as error:
            raise ConfigError(f"cannot read {file} ({error.strerror})") from error
    try:
        load()
    except ssl.SSLError as error:
        what = "a certificate and its key" if name == "cert_file" else "certificates"
        of = f"{files['cert_file']} and {files['key_file']} do" if name == "cert_file" else f"{files[name]} does"
        raise ConfigError(f"{of} not hold {what} in PEM form ({error.reason or error})") from error


def _no_password() -> str:
    """Refuse a key that is encrypted: OpenSSL would ask for the password on the terminal."""
    raise ConfigError("key_file is encrypted; give one without a password, mode 0600")


def _boolean(section: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = section.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value


def _headers(section: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    if _boolean(section, "http2", default=False):
        raise ConfigError("http_server_config.http2 is not supported here; leave it out or set it to false")
    headers = _section(section.get("headers"), "http_server_config.headers")
    for name, value in headers.items():
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise ConfigError(f"the header {name} must be one line of ASCII text, got {value!r}")
    return tuple(headers.items())


def _users(value: Any) -> dict[str, bytes]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"basic_auth_users must map names to bcrypt hashes, got a {type(value).__name__}")
    users = {}
    for name, hashed in value.items():
        found = BCRYPT.fullmatch(str(hashed))
        if found is None or not 4 <= int(found[1]) <= LARGEST_COST:
            raise ConfigError(
                f"the password of {name!r} must be a bcrypt hash ($2y$..., 60 characters) with a cost of 4 to "
                f"{LARGEST_COST}; make one with `htpasswd -nBC 10 {name}`"
            )
        users[str(name)] = found[0].encode()
    return users
