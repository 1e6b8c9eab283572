"""Posts events to one webhook, signed by the scheme of https://www.standardwebhooks.com."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import random
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import standardwebhooks
import tenacity
import urllib3

from rksp_core.errors import ConfigError
from rksp_monitor.announce_settings import Webhook

Document = Mapping[str, Any]

PASSING = {408, 425, 429}  # statuses of a receiver that may do better later, like all from 500 up
LONGEST_DELAY = 300.0  # seconds between two attempts
SECRET_BYTES = 24  # the least that Standard Webhooks allows

_random = random.SystemRandom()  # the state of the common generator is not ours to touch


@dataclass(frozen=True)
class _Outcome:
    """What one attempt came to; ``passing``: another one may do better, after ``wait`` seconds or more."""

    problem: str
    passing: bool = False
    wait: float = 0.0


class Post:
    """Posts to a webhook. Its url may be a secret (chat services), so only scheme and host are ever said."""

    def __init__(self, settings: Webhook) -> None:
        parts = urlsplit(settings.url)
        self.name = f"{parts.scheme}://{parts.netloc}"
        self._settings = settings
        secret = _secret(settings, self.name)
        self._signer = None if secret is None else standardwebhooks.Webhook(secret)
        try:
            context = ssl.create_default_context(cafile=settings.ca_file)
        except OSError as error:  # which ssl.SSLError is too
            raise ConfigError(
                f"cannot read certificates for the webhook {self.name} from {settings.ca_file} ({error.strerror})"
            ) from error
        self._pool = _connect_through(
            _proxy(parts.scheme, parts.hostname or ""), ssl_context=context, timeout=settings.timeout, retries=False
        )

    def send(self, document: Document, stop: threading.Event) -> str:
        """Post until it is accepted, refused for good, or tried often enough."""
        body = json.dumps(document)
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda outcome: outcome.passing),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self._settings.attempts), tenacity.stop_when_event_set(stop)
            ),
            wait=self._delay,
            sleep=tenacity.sleep_using_event(stop),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        outcome: _Outcome = attempts(self._attempt, document["id"], body)
        return outcome.problem

    def _delay(self, state: tenacity.RetryCallState) -> float:
        """Double the delay at each attempt, give or take half: receivers are not asked in step by many watchers."""
        asked = state.outcome.result().wait if state.outcome else 0.0
        exponent = min(state.attempt_number - 1, 20)
        delay = self._settings.retry_delay * 2.0**exponent * _random.uniform(0.5, 1.5)
        return min(max(delay, asked), LONGEST_DELAY)

    def _attempt(self, identity: str, body: str) -> _Outcome:
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "rksp",
            "webhook-id": identity,
            "webhook-timestamp": str(int(now.timestamp())),
        }
        if self._signer is not None:
            headers["webhook-signature"] = self._signer.sign(identity, now, body)
        try:
            answer = self._pool.request(
                "POST", self._settings.url, body=body, headers=headers, redirect=False, preload_content=False
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            text = str(error).replace(self._settings.url, self.name)
            return _Outcome(f"{type(error).__name__}: {text}", passing=True)
        with contextlib.closing(answer):  # its body is not read: it may have no end
            status = answer.status
            if 200 <= status < 300:
                return _Outcome("")
            if 300 <= status < 400:
                return _Outcome(f"it answered {status}, and redirects are not followed; set url to where it moved")
            retry_after = answer.headers.get("Retry-After", "")
        return _Outcome(
            f"it answered {status}",
            passing=status >= 500 or status in PASSING,
            wait=float(retry_after) if retry_after.isdecimal() and len(retry_after) < 7 else 0.0,
        )


def _proxy(scheme: str, host: str) -> str | None:
    """Return the proxy that https_proxy, http_proxy and no_proxy give this address, as curl reads them."""
    if proxy_bypass(host):
        return None
    return getproxies().get(scheme)


def _connect_through(proxy: str | None, **options: Any) -> urllib3.PoolManager:
    if proxy is None:
        return urllib3.PoolManager(**options)
    try:
        password = urllib3.util.parse_url(proxy).auth
        headers = urllib3.make_headers(proxy_basic_auth=password) if password else None
        return urllib3.ProxyManager(proxy, proxy_headers=headers, **options)
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise ConfigError("http_proxy or https_proxy in the environment is no http://HOST:PORT") from error


def _secret(settings: Webhook, name: str) -> bytes | None:
    """Read the signing secret, which is never in the settings: those are shown, committed and mailed."""
    if settings.secret_file is not None:
        source = str(settings.secret_file)
        try:
            text = settings.secret_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(f"cannot read the secret of the webhook {name} from {source} ({reason})") from None
    elif settings.secret_env is not None:
        source = f"the variable {settings.secret_env}"
        if settings.secret_env not in os.environ:
            raise ConfigError(f"{source}, which holds the secret of the webhook {name}, is not set")
        text = os.environ[settings.secret_env]
    else:
        return None
    encoded = text.strip().removeprefix("whsec_").rstrip("=")
    try:
        secret = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if len(secret) < SECRET_BYTES:
        raise ConfigError(
            f"{source} must hold base64 of at least {SECRET_BYTES} bytes, as the secret of the webhook {name}; "
            "make one with `openssl rand -base64 32`"
        )
    return secret
