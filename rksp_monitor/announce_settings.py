"""Whom the watcher tells what happened: the settings ``webhooks`` and ``hooks``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

EventName = Literal[
    "risk_level",
    "order",
    "answer",
    "acknowledgement_overdue",
    "checkpoint_failed",
    "run_added",
    "run_removed",
    "run_suspended",
    "stopped",
]
EVENTS: tuple[EventName, ...] = get_args(EventName)

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Receiver(BaseModel):
    """What webhooks and hooks have in common."""

    model_config = ConfigDict(frozen=True)

    events: tuple[EventName, ...] = Field(default=EVENTS, description="Events that are told; all when left out.")
    queue: Count = Field(default=1000, description="Events that may wait; further ones are dropped and counted.")


class Webhook(Receiver):
    """An address that events are posted to as JSON, signed by the Standard Webhooks scheme when there is a secret."""

    url: str = Field(description="Where to post: https://..., or http://... on a network you trust.")
    secret_file: Path | None = Field(
        default=None, description="File that holds the signing secret, base64 of at least 24 bytes (or whsec_...)."
    )
    secret_env: str | None = Field(
        default=None, description="Name of the environment variable that holds the signing secret."
    )
    ca_file: Path | None = Field(
        default=None, description="Certificates (PEM) that the receiver is checked against; null takes the system's."
    )
    timeout: Seconds = Field(default=10.0, description="Seconds to connect, and to wait for each part of the answer.")
    attempts: Count = Field(default=8, description="Attempts before an event counts as failed.")
    retry_delay: Seconds = Field(
        default=1.0, description="Seconds before the second attempt; about doubled for each further one."
    )

    @field_validator("url")
    @classmethod
    def _address(cls, value: str) -> str:
        parts = urlsplit(value)
        _ = parts.port  # raises when it is none
        if parts.scheme not in {"http", "https"} or not parts.hostname or not value.isprintable() or " " in value:
            raise ValueError("a webhook's url is https://HOST/PATH")
        if parts.username is not None or parts.password is not None:
            raise ValueError("a webhook's url holds no user or password; sign with secret_file instead")
        return value

    @model_validator(mode="after")
    def _one_secret(self) -> Webhook:
        if self.secret_file is not None and self.secret_env is not None:
            raise ValueError("a webhook takes secret_file or secret_env, not both")
        return self


class Hook(Receiver):
    """A command that is run at events, one at a time: the event as JSON on its standard input, no shell."""

    command: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="Program and arguments as a list, such as [/usr/local/bin/page, --team, training]."
    )
    timeout: Seconds = Field(default=60.0, description="Seconds after which the command and its children are ended.")

    @field_validator("command")
    @classmethod
    def _program(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value[0] or any("\0" in part for part in value):
            raise ValueError("a command is a list that begins with a program")
        return value
