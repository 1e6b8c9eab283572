"""``rksp probe make`` and ``rksp probe show``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rksp_core.errors import ConfigError

if TYPE_CHECKING:
    from rksp_monitor.probe import Probe

probe = typer.Typer(no_args_is_help=True, help="Make or show a probe: the fixed batch that models are profiled on.")


@probe.command()
def make(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The probe file to write, a .safetensors.")],
    text: Annotated[Path | None, typer.Option(help="From this text, with --tokenizer.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of the text is one prompt, padded.")] = False,
    batch: Annotated[Path | None, typer.Option(help="From a raw .npy, .pt or .safetensors batch.")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="Random tokens of a vocabulary of this size.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Of a text or random tokens.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a sequence of a text or random tokens.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of random tokens.")] = 0,
) -> int:
    """Make a probe from a text, from a raw batch, or from random tokens."""
    from rksp_monitor.memory import memory_limit
    from rksp_monitor.output_file import require_writable
    from rksp_monitor.probe import random_probe, read_probe, write_probe
    from rksp_monitor.tokens import text_probe

    if sum(source is not None for source in (text, batch, vocabulary)) != 1:
        raise ConfigError("give one source of the probe: --text with --tokenizer, --batch, or --vocabulary")
    if (text is None) != (tokenizer is None):
        raise ConfigError("--text and --tokenizer belong together: give both, or neither")
    if output.suffix != ".safetensors":
        raise ConfigError(f"a probe file ends in .safetensors, got {output}")
    require_writable(output)
    if text is not None and tokenizer is not None:
        made = text_probe(text, tokenizer, sequences=sequences, length=length, lines=lines)
        if len(made.batch["input_ids"]) < sequences:
            print(f"rksp: the text fills {len(made.batch['input_ids'])} of {sequences} sequences", file=sys.stderr)
    elif batch is not None:
        made = read_probe(batch)
    else:
        with memory_limit("cpu", "lower --sequences or --length"):
            made = random_probe(vocabulary or 0, sequences, length, seed)
    try:
        write_probe(made, output)
    except OSError as error:
        raise ConfigError(f"the probe {output} cannot be written: {error.strerror}") from error
    print(_lines(made))
    return 0


@probe.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="PROBE", help="A probe, or a raw batch file.")],
    form: Annotated[Literal["table", "json"], typer.Option("--format")] = "table",
) -> int:
    """Show a probe's content hash, origin, shapes and number of distinct tokens."""
    from rksp_monitor.probe import read_probe

    found = read_probe(path)
    print(json.dumps({**found.to_dict(), "metadata": dict(found.metadata)}) if form == "json" else _lines(found))
    return 0


def _lines(found: Probe) -> str:
    about = found.to_dict()
    lines = [f"sha256           {about['sha256']}", f"origin           {about['origin']}"]
    lines += [f"{name:16} {entry['dtype']} {tuple(entry['shape'])}" for name, entry in about["tensors"].items()]
    if "distinct_tokens" in about:
        lines.append(f"distinct tokens  {about['distinct_tokens']}")
    return "\n".join(lines)
