"""The adapters cost nobody anything who does not use them, and say what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_the_core_imports_no_trainer() -> None:
    code = "import sys, rksp_core, rksp_core.integrations, rksp_core.follower, rksp_core.integrations.loop\n"
    code += "print(sorted({'transformers', 'lightning', 'accelerate'} & set(sys.modules)))"
    assert python(code).stdout == "[]\n"


@pytest.mark.parametrize(("module", "extra"), [("huggingface", "hf"), ("lightning", "lightning")])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(module: str, extra: str) -> None:
    hidden = "import sys; sys.modules['transformers'] = sys.modules['lightning'] = None\n"
    done = python(f"{hidden}import rksp_core.integrations.{module}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"pip install 'rksp[{extra}]'")
