"""Webhooks against a real HTTP receiver, and hooks that are real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import standardwebhooks
from pydantic import ValidationError
from structlog import wrap_logger
from structlog.testing import CapturingLogger, LogCapture

from rksp_core.errors import ConfigError
from rksp_monitor import hook
from rksp_monitor.announce import DROPPED, FAILED, SENT, Announcer
from rksp_monitor.announce_settings import EVENTS, Hook, Webhook
from tests.monitor.certificates import make_certificate

SECRET = "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo="  # base64 of the alphabet


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reach the receivers of these tests directly, wherever they run."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@dataclass
class Receiver:
    """What a test's HTTP server was sent, and the statuses that it answers with; the last one goes on."""

    url: str = ""
    statuses: list[int] = field(default_factory=lambda: [204])
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    hold: threading.Event | None = None


@contextlib.contextmanager
def receiving(*statuses: int, context: ssl.SSLContext | None = None, **options: Any) -> Iterator[Receiver]:
    receiver = Receiver(statuses=list(statuses) or [204], **options)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
            if receiver.hold is not None:
                receiver.hold.wait(20)
            with contextlib.suppress(OSError):
                self.send_response(receiver.statuses.pop(0) if len(receiver.statuses) > 1 else receiver.statuses[0])
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    receiver.url = f"{'http' if context is None else 'https'}://127.0.0.1:{server.server_address[1]}/path"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        if receiver.hold is not None:
            receiver.hold.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


@dataclass
class Told:
    """An announcer, what it logged, and what it counted."""

    announcer: Announcer
    log: list[Any]
    counts: dict[tuple[str, str], int]

    def of(self, name: str) -> list[Any]:
        return [entry for entry in self.log if entry["event"] == name]


def announcing(*receivers: Webhook | Hook) -> Told:
    capture, counts = LogCapture(), {}

    def count(run: str, name: str) -> None:
        counts[run, name] = counts.get((run, name), 0) + 1

    made = Announcer(
        [each for each in receivers if isinstance(each, Webhook)],
        [each for each in receivers if isinstance(each, Hook)],
        wrap_logger(CapturingLogger(), processors=[capture]),
        count=count,
    )
    return Told(made, capture.entries, counts)


def eventually(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen in 20 s")


def python(code: str, **options: Any) -> Hook:
    return Hook(command=(sys.executable, "-c", code), **options)


# -- webhooks


def test_a_receiver_that_fails_twice_gets_the_event_at_the_third_attempt(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n")
    with receiving(500, 503, 204) as receiver:
        told = announcing(Webhook(url=receiver.url, secret_file=secret, retry_delay=0.01))
        told.announcer.announce("risk_level", "r", {"level": 2, "evidence": {"loss": float("nan")}})
        eventually(lambda: told.counts == {("r", SENT): 1})
        told.announcer.close()
    assert len(receiver.requests) == 3
    assert len({body for _, body in receiver.requests}) == 1
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1
    for headers, body in receiver.requests:
        document = standardwebhooks.Webhook(SECRET).verify(body, headers)
    jsonschema.validate(document, json.loads((files("rksp_monitor") / "schemas" / "event.json").read_text()))
    assert (document["event"], document["run"], document["level"], document["evidence"]) == (
        "risk_level",
        "r",
        2,
        {"loss": None},
    )
    assert document["id"] == headers["webhook-id"]
    assert headers["content-type"] == "application/json"


def test_the_schema_names_the_events_of_the_settings():
    schema = json.loads((files("rksp_monitor") / "schemas" / "event.json").read_text())
    assert schema["properties"]["event"]["enum"] == list(EVENTS)


def test_a_document_cannot_pretend_to_be_another_event():
    with receiving() as receiver:
        told = announcing(Webhook(url=receiver.url))
        told.announcer.announce("order", "r", {"event": "stopped", "run": "other", "path": Path("a"), "generation": 3})
        told.announcer.close()
    document = json.loads(receiver.requests[0][1])
    assert [document[name] for name in ("event", "run", "path", "generation")] == ["order", "r", "a", 3]
    assert "webhook-signature" not in receiver.requests[0][0]


def test_only_the_events_that_were_asked_for_are_sent_in_order():
    with receiving() as receiver:
        told = announcing(Webhook(url=receiver.url, events=("order", "answer")))
        for event in ("risk_level", "order", "run_added", "answer", "order"):
            told.announcer.announce(event, "r", {})
        told.announcer.close()
    assert [json.loads(body)["event"] for _, body in receiver.requests] == ["order", "answer", "order"]


@pytest.mark.parametrize(
    ("status", "attempts", "problem"),
    [
        (404, 1, "it answered 404"),
        (302, 1, "it answered 302, and redirects are not followed"),
        (429, 3, "it answered 429"),
        (500, 3, "it answered 500"),
    ],
)
def test_what_cannot_get_better_is_not_tried_again(status: int, attempts: int, problem: str):
    with receiving() as elsewhere, receiving(status, headers={"Location": elsewhere.url}) as receiver:
        told = announcing(Webhook(url=receiver.url, attempts=3, retry_delay=0.01))
        told.announcer.announce("order", "r", {})
        eventually(lambda: told.counts == {("r", FAILED): 1})
        told.announcer.close()
    assert len(receiver.requests) == attempts
    assert elsewhere.requests == []
    (entry,) = told.of("event not delivered")
    assert entry["problem"].startswith(problem)


def test_the_receiver_may_ask_for_patience(monkeypatch: pytest.MonkeyPatch):
    with receiving(429, 204, headers={"Retry-After": "1"}) as receiver:
        told = announcing(Webhook(url=receiver.url, retry_delay=0.001))
        told.announcer.announce("order", "r", {})
        eventually(lambda: len(receiver.requests) == 2)
        told.announcer.close()
    stamps = [int(headers["webhook-timestamp"]) for headers, _ in receiver.requests]
    assert stamps[1] - stamps[0] >= 1


def test_the_path_of_a_url_is_never_said():
    told = announcing(Webhook(url="http://127.0.0.1:9/T0/s3cret", attempts=2, retry_delay=0.001))
    told.announcer.announce("order", "r", {})
    eventually(lambda: bool(told.counts))
    told.announcer.close()
    assert "s3cret" not in str(told.log)
    assert told.log[0]["receiver"] == "http://127.0.0.1:9"


def test_a_dead_receiver_takes_no_memory_and_holds_up_nobody():
    with receiving(hold=threading.Event()) as dead, receiving() as alive:
        told = announcing(Webhook(url=dead.url, queue=5), Webhook(url=alive.url))
        told.announcer.announce("order", "r", {"n": -1})
        eventually(lambda: len(dead.requests) == 1)
        for n in range(20):
            told.announcer.announce("order", "r", {"n": n})
        eventually(lambda: len(alive.requests) == 21)
        assert told.counts["r", DROPPED] == 15
        assert len(told.of("events are dropped")) == 1
        dead.hold.set()
        eventually(lambda: len(dead.requests) == 6)
        told.announcer.close()
    assert [json.loads(body)["n"] for _, body in dead.requests] == [-1, 0, 1, 2, 3, 4]
    assert len(told.of("events are delivered again")) == 1


def test_what_waits_at_the_end_is_sent_or_counted():
    with receiving() as receiver, receiving(500) as down:
        told = announcing(Webhook(url=receiver.url), Webhook(url=down.url, retry_delay=100.0))
        for n in range(50):
            told.announcer.announce("order", "r", {"n": n})
        told.announcer.close(timeout=0.5)
        told.announcer.announce("order", "r", {})
    assert [json.loads(body)["n"] for _, body in receiver.requests] == list(range(50))
    assert told.counts["r", SENT] == 50
    # One was being tried, the others waited; the one after the end reached neither.
    assert told.counts["r", FAILED] == 1
    assert told.counts["r", DROPPED] == 49 + 2
    assert {"reason": "the watcher ends", "events": 49}.items() <= told.of("events are dropped")[0].items()


def test_tls_is_verified(tmp_path: Path):
    certificate, key = make_certificate(tmp_path, "receiver")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with receiving(context=context) as receiver:
        told = announcing(
            Webhook(url=receiver.url, events=("order",), ca_file=certificate),
            Webhook(url=receiver.url, events=("answer",), attempts=1),
        )
        told.announcer.announce("order", "trusted", {})
        told.announcer.announce("answer", "stranger", {})
        eventually(lambda: len(told.counts) == 2)
        told.announcer.close()
    assert told.counts == {("trusted", SENT): 1, ("stranger", FAILED): 1}


def test_a_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch):
    with receiving() as proxy, receiving() as receiver:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/path").replace("//", "//anna:word@"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        told = announcing(Webhook(url="http://far.invalid/x"), Webhook(url=receiver.url))
        told.announcer.announce("order", "r", {})
        eventually(lambda: told.counts == {("r", SENT): 2})
        told.announcer.close()
    ((headers, _),) = proxy.requests
    assert (headers["host"], headers["proxy-authorization"]) == ("far.invalid", "Basic YW5uYTp3b3Jk")
    assert len(receiver.requests) == 1


def test_a_bad_proxy_is_said_without_its_password(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("https_proxy", "ftp://anna:word@h")
    with pytest.raises(ConfigError, match="https_proxy in the environment") as caught:
        announcing(Webhook(url="https://h/x"))
    assert "word" not in str(caught.value)


def test_a_run_that_is_gone_is_no_matter():
    def gone(run: str, name: str) -> None:
        raise KeyError(run)

    capture = LogCapture()
    with receiving() as receiver:
        announcer = Announcer(
            [Webhook(url=receiver.url)], [], wrap_logger(CapturingLogger(), processors=[capture]), count=gone
        )
        for _ in range(2):
            announcer.announce("run_removed", "r", {})
        announcer.close()
    assert len(receiver.requests) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot read the secret of the webhook https://h from .* \\(No such file"),
        ("not base64 at all, but long enough", "must hold base64 of at least 24 bytes"),
        ("c2hvcnQ=", "make one with `openssl rand -base64 32`"),
    ],
)
def test_a_bad_secret_is_said_at_the_start_and_not_shown(tmp_path: Path, text: str | None, problem: str):
    secret = tmp_path / "secret"
    if text is not None:
        secret.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        announcing(Webhook(url="https://h/x", secret_file=secret))
    assert text is None or text not in str(caught.value)


def test_a_secret_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch):
    webhook = Webhook(url="https://h/x", secret_env="HOOK_SECRET")
    with pytest.raises(ConfigError, match=r"the variable HOOK_SECRET, .* is not set"):
        announcing(webhook)
    monkeypatch.setenv("HOOK_SECRET", SECRET.removeprefix("whsec_"))
    announcing(webhook).announcer.close()


def test_a_ca_file_that_holds_none_is_said(tmp_path: Path):
    (tmp_path / "ca").write_text("")
    with pytest.raises(ConfigError, match="cannot read certificates for the webhook https://h"):
        announcing(Webhook(url="https://h/x", ca_file=tmp_path / "ca"))


@pytest.mark.parametrize(
    "url", ["ftp://h/x", "https://", "https://user:word@h/x", "https://h/a b", "https://h/\n", "https://h:x/", "h/x"]
)
def test_what_is_no_address_is_refused(url: str):
    with pytest.raises(ValidationError, match=r"a webhook's url|Port could not"):
        Webhook(url=url)


def test_settings_are_refused_where_they_say_two_things(tmp_path: Path):
    with pytest.raises(ValidationError, match="secret_file or secret_env"):
        Webhook(url="https://h", secret_file=tmp_path, secret_env="A")
    with pytest.raises(ValidationError):
        Hook(command=())
    with pytest.raises(ValidationError):
        Hook(command=("a",), events=("explosion",))


# -- hooks


def test_a_hook_reads_the_event_and_knows_event_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    code = (
        "import json, os, sys; print(json.dumps([json.load(sys.stdin), sys.argv[1:],"
        " *(os.environ.get(n) for n in ('RKSP_EVENT', 'RKSP_RUN', 'NOTIFY_SOCKET'))]))"
    )
    told = announcing(Hook(command=(sys.executable, "-c", code, "$(touch here); *")))
    told.announcer.announce("checkpoint_failed", "a\nb", {"path": "x" * 200_000})
    told.announcer.close(20)
    assert told.counts == {("a\nb", SENT): 1}
    assert len(told.of("output")[0]["text"]) == hook.OUTPUT
    told = announcing(Hook(command=(sys.executable, "-c", code, "$(touch here); *")))
    told.announcer.announce("checkpoint_failed", "a\nb", {"path": "x"})
    told.announcer.close(20)
    document, arguments, event, run, notify = json.loads(told.of("output")[0]["text"])
    assert (document["event"], document["path"]) == ("checkpoint_failed", "x")
    assert arguments == ["$(touch here); *"]  # no shell saw it
    assert (event, run, notify) == ("checkpoint_failed", "a\nb", None)


@pytest.mark.parametrize(
    ("hook", "problem"),
    [
        (python("raise SystemExit(3)"), "exit code 3"),
        (python("import os; os.kill(os.getpid(), 9)"), "killed by signal 9"),
        (Hook(command=("/nowhere/at/all",)), "it cannot be started (No such file or directory)"),
    ],
)
def test_a_hook_that_fails_says_how(hook: Hook, problem: str):
    told = announcing(hook)
    told.announcer.announce("order", "r", {})
    told.announcer.close(20)
    assert told.counts == {("r", FAILED): 1}
    assert told.of("event not delivered")[0]["problem"] == problem


FAMILY = """
import os, pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
path = pathlib.Path(sys.argv[1])
path.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
path.with_suffix(".new").rename(path)
time.sleep(600)
"""


def test_a_hook_that_takes_too_long_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hook, "GRACE", 0.1)
    told = announcing(Hook(command=(sys.executable, "-c", FAMILY, str(tmp_path / "ids")), timeout=2.0))
    told.announcer.announce("order", "r", {})
    eventually(lambda: bool(told.counts))
    told.announcer.close()
    assert told.of("event not delivered")[0]["problem"] == "it took over 2 s"
    for identity in (tmp_path / "ids").read_text().split():
        eventually(lambda pid=int(identity): not is_running(pid))


def test_the_end_kills_a_hook_that_is_still_running(tmp_path: Path):
    told = announcing(Hook(command=(sys.executable, "-c", FAMILY, str(tmp_path / "ids"))))
    told.announcer.announce("order", "r", {})
    eventually((tmp_path / "ids").exists)
    told.announcer.close(0.0)
    assert told.of("event not delivered")[0]["problem"] == "it was ended with the watcher"
    for identity in (tmp_path / "ids").read_text().split():
        eventually(lambda pid=int(identity): not is_running(pid))


LEAVES_A_CHILD = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True).pid)
"""


def test_a_child_left_in_the_background_does_not_hold_up_the_next_event():
    told = announcing(python(LEAVES_A_CHILD))
    told.announcer.announce("order", "r", {})
    eventually(lambda: told.counts == {("r", SENT): 1})  # although the child holds the pipe
    told.announcer.close()
    child = int(told.of("output")[0]["text"])
    assert is_running(child)
    os.kill(child, signal.SIGKILL)


def test_a_hook_runs_once_at_a_time(tmp_path: Path):
    code = "import pathlib, sys, time; path = pathlib.Path(sys.argv[1]); path.mkdir(); time.sleep(0.05); path.rmdir()"
    told = announcing(Hook(command=(sys.executable, "-c", code, str(tmp_path / "busy"))))
    for _ in range(4):
        told.announcer.announce("order", "r", {})
    told.announcer.close(20)
    assert told.counts == {("r", SENT): 4}  # a second one meanwhile would have failed to make the folder


def is_running(pid: int) -> bool:
    """Whether a process lives; one that ended and was not reaped does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
