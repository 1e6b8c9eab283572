"""Basic auth against bcrypt hashes: slow for those who guess, quick for those who know."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import bcrypt

Answer = Literal["granted", "refused", "busy"]

CHECKS = 2  # bcrypt checks at once, over all clients
WAITING = 8  # checks that one address may have in hand; with more it is told to come back
REMEMBERED = 100  # answers that are kept, as many as exporter-toolkit keeps


class Guard:
    """Checks passwords: slowly the first time, as bcrypt is meant to be, and from memory after that.

    Right and wrong answers are remembered under a keyed hash, so no password is kept and a comparison tells nothing.
    At most `CHECKS` bcrypt checks run at once, and one address has at most `WAITING` in hand and one of them running:
    whoever tries many passwords queues behind himself.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._answers: OrderedDict[bytes, bool] = OrderedDict()
        self._lock = threading.Lock()
        self._checks = threading.BoundedSemaphore(CHECKS)
        self._turns: dict[str, tuple[threading.Lock, int]] = {}  # address -> (its turn, checks in hand)
        self._closed = False

    def close(self) -> None:
        """Begin no further check, and wait for those that run: Python aborts when it ends beneath bcrypt's Rust."""
        self._closed = True
        for _ in range(CHECKS):
            self._checks.acquire()

    def admit(self, users: Mapping[str, bytes], authorization: str, address: str) -> Answer:
        """Say whether an ``Authorization`` header names a user and his password."""
        given = _credentials(authorization)
        if given is None:
            return "refused"
        name, password = given
        known = name in users
        # An unknown name takes as long as a known one.
        hashed = users[name] if known else next(iter(users.values()))
        parts = (name.encode(), hashed, password)
        key = hmac.digest(self._key, b"".join(len(part).to_bytes(4, "big") + part for part in parts), hashlib.sha256)
        answer = self._remembered(key)
        if answer is None:
            with self._turn(address) as admitted:
                if not admitted:
                    return "busy"
                answer = self._remembered(key)  # another request of the same client may have been first
                if answer is None:
                    with self._checks:
                        if self._closed:
                            return "busy"
                        answer = _matches(password, hashed) and known
                    self._remember(key, answer)
        return "granted" if answer else "refused"

    def _remembered(self, key: bytes) -> bool | None:
        with self._lock:
            answer = self._answers.get(key)
            if answer is not None:
                self._answers.move_to_end(key)
            return answer

    def _remember(self, key: bytes, answer: bool) -> None:
        with self._lock:
            self._answers[key] = answer
            if len(self._answers) > REMEMBERED:
                # Wrong answers go first: a flood of them must not push out the right one of a scraper.
                wrong = next((each for each, right in self._answers.items() if not right), None)
                self._answers.pop(next(iter(self._answers)) if wrong is None else wrong)

    @contextmanager
    def _turn(self, address: str) -> Iterator[bool]:
        """Wait for the turn of this address; false when too many wait already."""
        with self._lock:
            turn, waiting = self._turns.get(address, (threading.Lock(), 0))
            if waiting >= WAITING:
                admitted = False
            else:
                admitted, self._turns[address] = True, (turn, waiting + 1)
        if not admitted:
            yield False
            return
        try:
            with turn:
                yield True
        finally:
            with self._lock:
                turn, waiting = self._turns[address]
                if waiting == 1:
                    del self._turns[address]
                else:
                    self._turns[address] = (turn, waiting - 1)


def _credentials(authorization: str) -> tuple[str, bytes] | None:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.casefold() != "basic":
        return None
    try:
        name, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        return (name.decode(), password) if colon else None
    except (binascii.Error, ValueError):
        return None


def _matches(password: bytes, hashed: bytes) -> bool:
    try:
        return bcrypt.checkpw(password, hashed)
    except ValueError:  # longer than the 72 bytes that bcrypt looks at
        return False
