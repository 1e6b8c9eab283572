"""The web configuration: what is refused and how, TLS and passwords over real sockets, and changes while it serves."""

from __future__ import annotations

import base64
import contextlib
import http.client
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import pytest
from prometheus_client import CollectorRegistry

from rksp_core.errors import ConfigError
from rksp_monitor import passwords, web_config
from rksp_monitor.endpoint import serve
from rksp_monitor.passwords import REMEMBERED, WAITING, Guard
from rksp_monitor.web_config import WebConfig
from tests.monitor.certificates import make_certificate

PASSWORD = "correct horse"
# A fixed salt: the hash is part of the name of a test, which each process of a parallel run must know by the same one.
HASH = bcrypt.hashpw(PASSWORD.encode(), b"$2b$04$abcdefghijklmnopqrstuu").decode()
OTHER = bcrypt.hashpw(b"battery staple", bcrypt.gensalt(4)).decode()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("server", "second", "client"):
        make_certificate(folder, name)
    return folder


@pytest.fixture
def path(certificates: Path, tmp_path: Path) -> Path:
    """Return where the YAML goes, with the certificates beside it."""
    for file in certificates.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / "web.yaml"


@contextlib.contextmanager
def serving(path: Path, said: list[str] | None = None) -> Iterator[str]:
    warn = (lambda _: None) if said is None else said.append
    registry = CollectorRegistry()
    with serve(
        "127.0.0.1:0", registry, healthy=lambda: True, ready=lambda: True, web_config=path, warn=warn
    ) as address:
        yield address


def ask(
    address: str,
    path: str = "/metrics",
    *,
    user: str = "",
    password: str = PASSWORD,
    context: ssl.SSLContext | None = None,
):
    connection = (
        http.client.HTTPConnection(address, timeout=20)
        if context is None
        else http.client.HTTPSConnection(address, timeout=20, context=context)
    )
    with contextlib.closing(connection):
        headers = {"Authorization": basic(user, password)} if user else {}
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        response.read()
        return response


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


def rewrite(path: Path, text: str) -> None:
    """Replace a file; the new one is another inode, so the change is seen whatever the clock's resolution."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


TLS = "tls_server_config: {cert_file: server.crt, key_file: server.key}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tls_config: {}", "unknown key 'tls_config'; did you mean 'tls_server_config'"),
        ("tls_server_config: {certfile: a}", "unknown key 'tls_server_config.certfile'; did you mean 'cert_file'"),
        ("tls_server_config: {cert_file: server.crt}", "needs both cert_file and key_file"),
        ("tls_server_config: {cert: x}", "tls_server_config.cert is not supported here; name a file with cert_file"),
        ("tls_server_config: {curve_preferences: [X25519]}", "curve_preferences is not supported here"),
        ("tls_server_config: {cert_file: no.crt, key_file: server.key}", "cannot read .*no.crt"),
        ("tls_server_config: {cert_file: server.crt, key_file: second.key}", "do not hold a certificate and its key"),
        (TLS.replace("}", ", min_version: TLS10}"), "min_version must be one of TLS12, TLS13, got 'TLS10'"),
        (TLS.replace("}", ", min_version: TLS13, max_version: TLS12}"), "min_version is above max_version"),
        (TLS.replace("}", ", client_auth_type: RequireAnyClientCert}"), "client_auth_type must be one of"),
        (TLS.replace("}", ", client_auth_type: RequireAndVerifyClientCert}"), "need each other"),
        (TLS.replace("}", ", client_ca_file: client.crt}"), "need each other"),
        (TLS.replace("}", ", cipher_suites: [TLS_RSA_WITH_RC4_128_SHA]}"), "cipher_suites must be one of"),
        ("http_server_config: {http2: true}", "http2 is not supported"),
        ("http_server_config: {headers: {X-Frame: deny}}", "did you mean 'X-Frame-Options'"),
        ('http_server_config: {headers: {X-Frame-Options: "deny\\r\\nSet-Cookie: a"}}', "one line of ASCII"),
        ("basic_auth_users: {anna: secret}", "password of 'anna' must be a bcrypt hash"),
        (f"basic_auth_users: {{anna: {HASH.replace('$04$', '$20$')}}}", "cost of 4 to 14"),
        ("- a", "the file must be a mapping"),
        ("a: [", r"is no YAML \(line 1\)"),
        ("a: " + "[" * 5000, "is no YAML"),
        ("a: 2026-13-32", "is no YAML"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_sentence(path: Path, text: str, problem: str):
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        WebConfig(path, print)
    said = str(caught.value)
    assert "\n" not in said
    assert str(path) in said
    assert "secret" not in said
    assert HASH[7:] not in said


@pytest.mark.real
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt: prometheus)")
@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("", True),
        (TLS, True),
        (TLS.replace("}", ", client_auth_type: RequireAndVerifyClientCert, client_ca_file: client.crt}"), True),
        (TLS.replace("}", ", min_version: TLS12, max_version: TLS13, prefer_server_cipher_suites: false}"), True),
        (TLS.replace("}", ", cipher_suites: [TLS_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384]}"), True),
        (f"basic_auth_users: {{anna: {HASH}}}\nhttp_server_config: {{headers: {{X-Frame-Options: deny}}}}\n", True),
        ("tls_config: {}", False),
        (TLS.replace("}", ", client_ca_file: client.crt}"), False),
        (TLS.replace("}", ", cipher_suites: [TLS_NONE]}"), False),
    ],
)
def test_promtool_thinks_the_same(path: Path, text: str, good: bool):
    path.write_text(text)
    assert (subprocess.run(["promtool", "check", "web-config", str(path)], capture_output=True).returncode == 0) == good
    with contextlib.nullcontext() if good else pytest.raises(ConfigError):
        WebConfig(path, print)


def test_a_file_that_is_not_there_is_said(path: Path):
    with pytest.raises(ConfigError, match=r"cannot read the web configuration .* \(No such file"):
        WebConfig(path, print)


def test_an_empty_file_allows_everybody(path: Path):
    path.write_text("")
    with serving(path) as address:
        assert ask(address).status == 200


def test_passwords_guard_everything_but_the_probes(path: Path):
    path.write_text(f"basic_auth_users: {{anna: {HASH}}}\nhttp_server_config: {{headers: {{X-Frame-Options: deny}}}}\n")
    with serving(path) as address:
        refused = ask(address)
        assert (refused.status, refused.getheader("WWW-Authenticate")) == (401, 'Basic realm="rksp", charset="UTF-8"')
        assert ask(address, user="anna").status == 200
        assert ask(address, user="anna").getheader("X-Frame-Options") == "deny"
        assert ask(address, user="anna", password="battery staple").status == 401
        assert ask(address, user="otto").status == 401
        assert ask(address, "/nothing").status == 401
        assert [ask(address, probe).status for probe in ("/healthz", "/readyz")] == [200, 200]


def test_tls_answers_only_in_tls(path: Path):
    path.write_text(TLS)
    with serving(path) as address:
        assert ask(address, context=trusting(path.parent / "server.crt")).status == 200
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            ask(address)


def test_versions_and_suites_hold(path: Path):
    path.write_text(
        TLS.replace("}", ", max_version: TLS12, cipher_suites: [TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256]}")
    )
    with serving(path) as address:
        old = trusting(path.parent / "server.crt")
        assert ask(address, context=old).status == 200
        old.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            ask(address, context=old)
        new = trusting(path.parent / "server.crt")
        new.minimum_version = ssl.TLSVersion.TLSv1_3
        with pytest.raises((ssl.SSLError, ConnectionError)):
            ask(address, context=new)


def test_clients_need_a_certificate_where_it_is_said(path: Path):
    path.write_text(TLS.replace("}", ", client_auth_type: RequireAndVerifyClientCert, client_ca_file: client.crt}"))
    with serving(path) as address:
        bare, known, stranger = (trusting(path.parent / "server.crt") for _ in range(3))
        known.load_cert_chain(path.parent / "client.crt", path.parent / "client.key")
        stranger.load_cert_chain(path.parent / "second.crt", path.parent / "second.key")
        assert ask(address, context=known).status == 200
        for context in (bare, stranger):
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
                ask(address, context=context)


def test_a_new_certificate_and_new_passwords_hold_at_once(path: Path):
    path.write_text(TLS + f"basic_auth_users: {{anna: {HASH}}}\n")
    with serving(path) as address:
        assert ask(address, user="anna", context=trusting(path.parent / "server.crt")).status == 200
        for kind in ("key", "crt"):
            (path.parent / f"second.{kind}").replace(path.parent / f"server.{kind}")
        context = trusting(path.parent / "server.crt")
        assert ask(address, user="anna", context=context).status == 200
        rewrite(path, TLS + f"basic_auth_users: {{anna: {OTHER}}}\n")
        assert ask(address, user="anna", context=context).status == 401
        assert ask(address, user="anna", password="battery staple", context=context).status == 200


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("basic_auth: {}", "did you mean 'basic_auth_users'"),
        ("", "no longer has basic_auth_users; restart"),  # what a half-written file looks like
    ],
)
def test_a_bad_new_file_keeps_the_old_one_and_is_said_once(path: Path, text: str, problem: str):
    said: list[str] = []
    path.write_text(f"basic_auth_users: {{anna: {HASH}}}\n")
    with serving(path, said) as address:
        rewrite(path, text)
        for _ in range(3):
            assert ask(address).status == 401
            assert ask(address, user="anna").status == 200
        assert len(said) == 1
        assert problem in said[0]
        rewrite(path, f"basic_auth_users: {{anna: {OTHER}}}\n")
        assert ask(address, user="anna").status == 401


def test_a_file_that_only_the_new_yaml_names_may_come_later(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(web_config, "RETRY_DELAY", 0.0)
    said: list[str] = []
    path.write_text(TLS)
    config = WebConfig(path, said.append)
    before = config.rules().context
    (path.parent / "second.crt").rename(path.parent / "aside")
    rewrite(path, TLS.replace("server.", "second."))
    assert config.rules().context is config.rules().context
    assert len(said) == 1
    (path.parent / "aside").rename(path.parent / "second.crt")
    assert config.rules().context is not before


def test_a_right_password_is_checked_slowly_once(monkeypatch: pytest.MonkeyPatch):
    checks = count_checks(monkeypatch)
    guard, users = Guard(), {"anna": HASH.encode()}
    assert [guard.admit(users, basic("anna", PASSWORD), "a") for _ in range(5)] == ["granted"] * 5
    assert checks == [PASSWORD.encode()]
    # Another hash of the same name is another question.
    assert guard.admit({"anna": OTHER.encode()}, basic("anna", PASSWORD), "a") == "refused"


def test_an_unknown_name_costs_as_much_and_is_refused_with_any_password(monkeypatch: pytest.MonkeyPatch):
    checks = count_checks(monkeypatch)
    assert Guard().admit({"anna": HASH.encode()}, basic("otto", PASSWORD), "a") == "refused"
    assert len(checks) == 1


@pytest.mark.parametrize("header", ["", "Bearer x", "Basic", "Basic !!!", "Basic YW5uYQ==", "Basic /zo="])
def test_what_is_no_password_is_refused(header: str):
    assert Guard().admit({"anna": HASH.encode()}, header, "a") == "refused"


def test_a_password_longer_than_bcrypt_looks_at_is_refused():
    assert Guard().admit({"anna": HASH.encode()}, basic("anna", "x" * 73), "a") == "refused"


def test_a_flood_of_wrong_passwords_waits_behind_itself_only(monkeypatch: pytest.MonkeyPatch):
    """One address with many wrong passwords in hand: another address gets in, and so does whoever was in before."""
    entered, go = threading.Semaphore(0), threading.Event()

    def slow(password: bytes, hashed: bytes) -> bool:
        if password.startswith(b"wrong"):
            entered.release()
            assert go.wait(20)
        return password == PASSWORD.encode()

    monkeypatch.setattr(passwords.bcrypt, "checkpw", slow)
    guard, users = Guard(), {"anna": HASH.encode()}
    assert guard.admit(users, basic("anna", PASSWORD), "flood") == "granted"
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(guard.admit(users, basic("anna", f"wrong{n}"), "flood")))
        for n in range(3 * WAITING)
    ]
    for thread in threads:
        thread.start()
    assert entered.acquire(timeout=20)
    while len(answers) < 2 * WAITING:  # those beyond the line are sent away while the first is still being checked
        go.wait(0.01)
    assert set(answers) == {"busy"}
    assert guard.admit(users, basic("anna", PASSWORD), "flood") == "granted"
    assert guard.admit(users, basic("anna", PASSWORD + " "), "elsewhere") == "refused"
    go.set()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == ["busy"] * 2 * WAITING + ["refused"] * WAITING


def test_wrong_passwords_do_not_push_out_the_right_one(monkeypatch: pytest.MonkeyPatch):
    checks = count_checks(monkeypatch)
    guard, users = Guard(), {"anna": HASH.encode()}
    guard.admit(users, basic("anna", PASSWORD), "a")
    for n in range(REMEMBERED + 5):
        guard.admit(users, basic("anna", str(n)), "a")
    checks.clear()
    assert guard.admit(users, basic("anna", PASSWORD), "a") == "granted"
    assert checks == []


ENDS_WHILE_PASSWORDS_ARE_CHECKED = """
import base64, itertools, threading, time
import bcrypt
from rksp_monitor.passwords import Guard

guard, users = Guard(), {"anna": bcrypt.hashpw(b"x", bcrypt.gensalt(4))}

def guess(client):
    for number in itertools.count():
        guard.admit(users, "Basic " + base64.b64encode(f"anna:{number}".encode()).decode(), client)

for client in "abcd":
    threading.Thread(target=guess, args=(client,), daemon=True).start()
time.sleep(0.2)
guard.close()
"""


def test_the_process_ends_well_while_passwords_are_checked():
    """Without `Guard.close` it is aborted: a thread that comes back from Rust finds no interpreter."""
    process = subprocess.run([sys.executable, "-c", ENDS_WHILE_PASSWORDS_ARE_CHECKED], capture_output=True, timeout=60)
    assert (process.returncode, process.stderr) == (0, b"")


def count_checks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Note every password that bcrypt is asked about."""
    checks: list[bytes] = []
    real = bcrypt.checkpw

    def noting(password: bytes, hashed: bytes) -> bool:
        checks.append(password)
        return real(password, hashed)

    monkeypatch.setattr(passwords.bcrypt, "checkpw", noting)
    return checks
