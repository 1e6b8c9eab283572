"""The adapters cost nobody anything who does not use them, and say what is missing."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, importlib
import rksp_core, rksp_core.integrations, rksp_core.follower, rksp_core.integrations.loop
print(sorted({'transformers', 'lightning', 'accelerate'} & set(sys.modules)))
for name in ('transformers', 'lightning'):
    sys.modules[name] = None  # as if it were not installed
for name in ('huggingface', 'lightning'):
    try:
        importlib.import_module('rksp_core.integrations.' + name)
    except ImportError as error:
        print(error)
"""


def test_the_core_imports_no_trainer_and_a_missing_one_is_named_with_the_command_that_installs_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120)
    imported, *missing = done.stdout.splitlines()
    assert imported == "[]"
    assert [said.partition("; ")[2] for said in missing] == ["pip install 'rksp[hf]'", "pip install 'rksp[lightning]'"]
