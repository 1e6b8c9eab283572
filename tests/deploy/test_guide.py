"""The guide of the watcher as a service: what it names exists, and its receiver of webhooks takes what we sign."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import get_args

import pytest

from rksp_monitor.announce import Announcer
from rksp_monitor.announce_settings import EventName, Webhook
from rksp_monitor.config import read_settings
from rksp_monitor.judge import OLD_SECONDS
from rksp_monitor.log import make_logger
from rksp_monitor.replay_worker import SUBJECTS
from rksp_monitor.session import FIXED
from tests.deploy.processes import PATH, ROOT, daemon, free_port, run, wait_until

PAGES = [ROOT / "docs/watching.md", ROOT / "docs/runbook.md"]
GUIDE = PAGES[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"]\(([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        if "://" not in target:
            goal = (page.parent / name) if name else page
            assert goal.exists(), target
            assert not anchor or anchor in _anchors(goal.read_text(encoding="utf-8")), target


def test_the_settings_of_the_guide_are_settings(tmp_path: Path):
    blocks = re.findall(r"(?:^    .*\n)+", GUIDE, re.MULTILINE)
    (tmp_path / "secret").write_text("c2VjcmV0" * 5, encoding="utf-8")
    shown = [block for block in blocks if re.match(r"    (runs|webhooks):", block)]
    assert len(shown) == 2
    for index, block in enumerate(shown):
        path = tmp_path / f"{index}.yaml"
        path.write_text(re.sub(r"^ {4}", "", block, flags=re.MULTILINE), encoding="utf-8")
        assert read_settings(path).model_fields_set


def test_what_waits_for_the_next_start_is_what_the_guide_says():
    before, _, _ = " ".join(GUIDE.split()).partition(" wait for the next start")
    assert set(re.findall(r"`(\w+)`", before.rpartition(". ")[2])) == set(FIXED)


def test_the_numbers_of_the_guide_are_those_of_the_watcher():
    text = " ".join(GUIDE.split())
    assert f"It keeps up to {SUBJECTS} models" in text
    assert OLD_SECONDS == 60, "the guide says: more than a minute old"
    assert "evidence more than a minute old that a later event has overtaken" in text


def test_the_events_of_the_guide_exist():
    sentence = re.search(r"\*\*Webhooks and hooks\*\* are told (.*?):\n", GUIDE, re.DOTALL)
    assert sentence
    assert re.findall(r"`(\w+)`", sentence[1]) == list(get_args(EventName))


def test_the_receiver_of_the_guide_takes_our_signature_and_no_other(tmp_path: Path):
    code = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert code
    port = free_port()
    (tmp_path / "receiver.py").write_text(code[1].replace("9410", str(port)), encoding="utf-8")
    (tmp_path / "secret").write_text("c2VjcmV0" * 5, encoding="utf-8")
    (tmp_path / "other").write_text("b3RoZXIh" * 5, encoding="utf-8")
    command = ["sh", "-c", f"cd {tmp_path} && exec {sys.executable} -u receiver.py"]
    counted: list[str] = []
    with daemon(command, {"PATH": PATH}, tmp_path / "log"):
        wait_until(lambda: _answers(port), 10, "the receiver does not listen")
        for name in ("secret", "other"):
            webhook = Webhook(url=f"http://127.0.0.1:{port}/rksp", secret_file=tmp_path / name, attempts=1)
            announcer = Announcer([webhook], [], make_logger("critical"), count=lambda _, what: counted.append(what))
            announcer.announce("order", "demo", {"enforced": True})
            announcer.close()
    assert counted == ["rksp_notifications_sent_total", "rksp_notifications_failed_total"]
    assert "order demo 20" in (tmp_path / "log").read_text(encoding="utf-8")


def test_the_commands_of_the_guide_have_the_options_that_it_gives_them():
    for line in re.findall(r"^    (rksp .*)$", GUIDE, re.MULTILINE):
        words = line.split("#")[0].split(">")[0].split()
        command = words[1 : 3 if words[1] in ("config", "control", "policy") else 2]
        known = run([sys.executable, "-m", "rksp_monitor", *command, "--help"])
        for option in [word for word in words if word.startswith("--")]:
            assert option in known, line


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _answers(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
