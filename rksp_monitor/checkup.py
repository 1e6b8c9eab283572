"""What a watcher would find out only while it runs, found out before: each check is one line.

A finding is true (good), false (the watcher could not do its work; the line ends with the next step), or None (worth
knowing). Nothing is left behind: what is written is removed, and the ledger is only read.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import ssl
import stat
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError, ControlError, MemoryLimitError, ProbeError, RkspError
from rksp_monitor.config import RunSettings, WatchSettings
from rksp_monitor.history import Row, Selection, read_history
from rksp_monitor.printable import counted
from rksp_monitor.run import Run

Findings = Iterator[tuple[bool | None, str]]

LISTED = 5  # checkpoints that are named one by one
WAITING = ("seen", "ready", "processing")
ANSWERS = 1.0  # seconds within which a watcher answers


# -- the process


def check_process(settings: WatchSettings) -> Findings:
    """Check what all runs of one watcher share: endpoint, web configuration, webhooks, commands."""
    yield from _address(settings.listen)
    if settings.web_config is not None:
        from rksp_monitor.web_config import WebConfig

        try:
            WebConfig(settings.web_config, lambda _: None)
            yield True, f"web_config {settings.web_config} is valid"
        except RkspError as error:
            yield False, str(error)
    yield from _receivers(settings)


def _address(listen: str) -> Findings:
    from rksp_monitor.endpoint import parse_address

    host, port = parse_address(listen)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as channel:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            channel.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and _is_watchers(host, port):
                yield None, f"{listen} is in use by a watcher that answers; a second one would need another --listen"
            else:
                yield False, f"{listen} is not free ({error.strerror}); choose another --listen"
        else:
            yield True, f"{listen} is free for the metrics endpoint"


def _is_watchers(host: str, port: int) -> bool:
    """Whether a watcher answers there, with TLS or without: its certificate is for others to judge."""
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    place = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - asked, not bound
    for connection in (
        HTTPConnection(place, port, timeout=ANSWERS),
        HTTPSConnection(place, port, timeout=ANSWERS, context=anyone),
    ):
        try:
            with closing(connection):
                connection.request("GET", "/healthz")
                if connection.getresponse().read(16) in (b"ok\n", b"not now\n"):
                    return True
        except TimeoutError:
            return False
        except (OSError, HTTPException):  # no HTTP is spoken there, or only within TLS
            continue
    return False


def _receivers(settings: WatchSettings) -> Findings:
    from rksp_monitor.announce import Announcer
    from rksp_monitor.log import make_logger

    for webhook in settings.webhooks:
        place = webhook.url.split("/")[2]  # the rest may be a secret
        try:
            Announcer([webhook], (), make_logger()).close()
        except RkspError as error:
            yield False, str(error)
        else:
            signed = webhook.secret_file is not None or webhook.secret_env is not None
            yield True, f"webhook {place}: {'its secret can be read' if signed else 'not signed'}"
    for hook in settings.hooks:
        program = hook.command[0]
        if shutil.which(program):
            yield True, f"command {program} is there"
        else:
            yield False, f"command {program} cannot be run; name an executable file with its whole path"


# -- a run


def check_run(run: Run, settings: RunSettings, *, deep: bool) -> Findings:
    """Check one run, from its folder to its trainer; ``deep`` also reads the newest checkpoint's weights."""
    from rksp_monitor.filesystem import describe, is_remote

    if not run.folder.is_dir():
        yield False, f"there is no run folder {run.folder}; the watcher would wait for it"
        return
    yield (None if is_remote(run.folder) else True), f"run {run.name!r} in {run.folder}: {describe(run.folder)}"
    yield from _ledger(run, settings)
    newest = yield from _checkpoints(run)
    yield from _subject(run, settings, newest if deep else None)
    yield from _reference(settings)
    yield from _control(run, settings)
    yield from _hold(run)


def _ledger(run: Run, settings: RunSettings) -> Findings:
    from rksp_monitor.filesystem import filesystem_of, is_remote
    from rksp_monitor.standing import look

    folder = _existing(run.ledger.parent)
    place = f"ledger {run.ledger} on {filesystem_of(folder) or 'an unknown file system'}"
    if is_remote(folder):
        yield False, f"{place}, where SQLite is not safe; name a local --state-dir"
    elif not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        yield False, f"{place} cannot be written; name another --state-dir"
    else:
        yield True, place
    with suppress(ControlError):  # a damaged hold is said further down
        try:
            watcher = look(run, settings, time.time()).watcher
            kept = _kept(run)
        except ConfigError as error:
            yield False, str(error)
            return
        watched = bool(watcher.owner) and watcher.alive is not False
        if watched:
            yield None, f"already watched by {watcher.owner}; a second watcher would be refused"
        enforces = watcher.enforces if watched else settings.enforce
        mode = "enforces: it writes orders" if enforces else "observes: it logs what it would order, and orders nothing"
        backlog = settings.backlog if isinstance(settings.backlog, str) else f"every {settings.backlog.every} steps"
        yield True, f"{mode}; backlog: {backlog}, {sum(kept[status][0] for status in WAITING)} waiting"
        for status in ("failed", "skipped"):
            count, last = kept[status]
            if last is not None:
                yield None, f"{counted(count, 'event')} {status}, the last is {last.kind} {last.step}: {last.error}"


def _kept(run: Run) -> dict[str, tuple[int, Row | None]]:
    """Return how many events of the ledger are in each state but done, and the last of them."""
    statuses = (*WAITING, "failed", "skipped")
    kept: dict[str, tuple[int, Row | None]] = dict.fromkeys(statuses, (0, None))
    if run.ledger.is_file():
        for row in read_history(run.ledger, run=run.name).rows(Selection(statuses=statuses)):
            kept[row.status] = kept[row.status][0] + 1, row
    return kept


def _existing(folder: Path) -> Path:
    """Return the nearest path that is there: the watcher would make the rest."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _checkpoints(run: Run) -> Generator[tuple[bool | None, str], None, Path | None]:
    """Check what a scan sees; return the newest checkpoint that can be read."""
    from rksp_monitor.discovery import Scanner

    scanner = Scanner(run.folder)
    try:
        found = scanner.scan()
    except OSError as error:
        yield False, f"{run.folder} cannot be listed ({error.strerror or error}); see its mount and permissions"
        return None
    steps = [sighting.step for sighting in found]
    span = f", steps {min(steps)} to {max(steps)}" if steps else ""
    formats = Counter(sighting.format or "unknown" for sighting in found)
    kinds = f" ({', '.join(f'{count} {name}' for name, count in sorted(formats.items()))})" if found else ""
    yield True, f"{len(found)} checkpoints and profiles{span}{kinds}"
    for problem in scanner.unreadable:
        yield False, f"{problem}; let this user read it"
    # One that only lies too short a time for a watcher to be sure of it is whole, as far as one look can say.
    poor = [sighting for sighting in found if not sighting.complete and not sighting.settling]
    for sighting in poor[-LISTED:]:
        yield (False if sighting.refused else None), f"step {sighting.step}: {sighting.problem}"
    if len(poor) > LISTED:
        yield None, f"{len(poor) - LISTED} earlier ones are not complete either"
    good = [sighting for sighting in found if sighting not in poor and sighting.kind == "checkpoint"]
    if not good:
        return None
    newest = max(good, key=lambda sighting: sighting.step)
    yield True, f"newest checkpoint: step {newest.step}, {newest.format}, complete"
    return newest.path


def _subject(run: Run, settings: RunSettings, newest: Path | None) -> Findings:
    from rksp_core.capture import find_blocks
    from rksp_core.device import choose_device
    from rksp_monitor.checkpoints import read_weights
    from rksp_monitor.memory import memory_limit
    from rksp_monitor.run_thread import subject_of
    from rksp_monitor.subject import Subject
    from rksp_monitor.weights import load_into

    wanted = subject_of(run, settings)
    if wanted is None:
        yield None, "no model: checkpoints would be skipped, the trainer's own profiles judged; give --model"
        return
    try:
        with memory_limit(choose_device(settings.device), "lower replay.sequences or replay.length"):
            subject = Subject(wanted)
    except ProbeError as error:
        yield False, f"probe: {error}"
        return
    except (RkspError, MemoryLimitError) as error:
        yield False, f"model: {error}"
        return
    blocks = len(find_blocks(subject.module, settings.blocks))
    size = sum(parameter.numel() for parameter in subject.module.parameters()) / 1e6
    yield True, f"model {run.model} builds: {size:.3g} M parameters, {blocks} blocks"
    probe = subject.probe.to_dict()
    yield True, f"probe {run.probe or 'of seeded random tokens'} fits it: sha256 {probe['sha256'][:12]}"
    if newest is None:
        return
    try:
        load_into(subject.module, read_weights(newest, trust_pickle=settings.trust_pickle), newest.name)
        yield True, f"the weights of {newest.name} fit it"
    except RkspError as error:
        yield False, str(error)


def _reference(settings: RunSettings) -> Findings:
    if settings.reference is None:
        return
    from rksp_monitor.reference import read_references

    try:
        series = read_references(settings.reference)
        counts = ", ".join(f"{len(reference.steps)} {kind}s" for kind, reference in series.items())
        yield True, f"reference {settings.reference}: {counts}"
    except RkspError as error:
        yield False, str(error)


def _control(run: Run, settings: RunSettings) -> Findings:
    """Write, read and remove a file as an order would be; a watcher that only observes does not need to."""
    from rksp_monitor.orders import OWNER
    from rksp_monitor.ownership import owner_of

    bad = False if settings.enforce else None
    wants = "" if settings.enforce else " (only needed with --enforce)"
    if run.control is None:
        yield bad, f"orders have nowhere to go; name a local control.folder{wants}"
        return
    if not run.control.is_dir():
        folder = _existing(run.control.parent)
        may = os.access(folder, os.W_OK | os.X_OK)
        yield (
            (True, f"control folder {run.control} will be made")
            if may
            else (
                bad,
                f"control folder {run.control} cannot be made; let this user write to {folder}{wants}",
            )
        )
        return
    orderer, alive = owner_of(run.control / OWNER)
    if orderer and alive is not False and orderer != owner_of(run.ledger)[0]:
        yield (
            bad,
            f"control folder {run.control} gets its orders from {orderer}; another watcher would be refused{wants}",
        )
    scratch, mode = run.control / f".rksp-doctor-{secrets.token_hex(4)}", int(settings.control.mode, 8)
    try:
        write_atomic(scratch, "{}", mode=mode)
        same = scratch.read_text() == "{}" and stat.S_IMODE(scratch.stat().st_mode) == mode
        scratch.unlink()
    except OSError as error:
        yield bad, f"control folder {run.control}: {error.strerror}; it must be one this user may write{wants}"
        return
    if same:
        yield True, f"control folder {run.control}: written, read and removed with mode {mode:04o}"
    else:
        yield bad, f"control folder {run.control} does not keep mode {mode:04o}; choose another control.folder{wants}"


def _hold(run: Run) -> Findings:
    from rksp_core.orders import timestamp
    from rksp_monitor.hold import hold_file, read_hold

    try:
        hold = read_hold(hold_file(run.ledger), time.time())
    except ControlError as error:
        yield False, str(error)
        return
    if hold is None:
        yield True, "no hold: the policy orders"
    else:
        until = "it is released" if hold.until is None else timestamp(hold.until)
        yield None, f"held by {hold.by or 'nobody named'} until {until}: {hold.reason or 'no reason given'}"
