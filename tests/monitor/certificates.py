"""Certificates for tests, made by the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Return (certificate, key) of 127.0.0.1; the certificate signs itself, so it is its own CA file."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    about = ("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run(
        ["openssl", "req", "-x509", *KEY, *about, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return certificate, key
