"""``rksp demo``: train one unstable model twice, with the loop and without it, and show what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

START_LIMIT = 120.0  # seconds


def demo(
    output: Annotated[Path, typer.Option(help="Folder of both runs and the page; must be empty or new.")] = Path(
        "runs/demo"
    ),
    config: Annotated[
        Path | None, typer.Option(help="The trainer's YAML; default: training/configs/demo.yaml of the checkout.")
    ] = None,
    watch_config: Annotated[
        Path | None, typer.Option(help="Settings of both watchers, for another policy; see `rksp config init`.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of both runs.")] = 42,
) -> int:
    """Train a small model that goes unstable, twice: with the watcher's orders obeyed, and without."""
    import time

    from rich.console import Console

    from rksp_core.atomic import write_atomic
    from rksp_core.errors import ConfigError, RkspError
    from rksp_monitor.demo.arm import Arm, find_checkout
    from rksp_monitor.demo.live import follow
    from rksp_monitor.demo.page import tell, verdict, write_page

    console, began = Console(stderr=True), time.monotonic()
    checkout = find_checkout()
    output = output.resolve()
    yaml = (config or checkout / "training" / "configs" / "demo.yaml").resolve()
    if not yaml.exists():
        raise ConfigError(f"there is no trainer configuration {yaml}; give one with --config")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; remove it, or choose another folder with --output")
    arms = [
        Arm(
            name,
            checkout=checkout,
            config=yaml,
            folder=output / name,
            enforce=enforce,
            seed=seed,
            watch_config=watch_config and watch_config.resolve(),
        )
        for name, enforce in (("without-loop", False), ("with-loop", True))
    ]
    try:
        with console.status("both runs are made ready: step 0, and a watcher beside each"):
            for process in [arm.prepare() for arm in arms]:
                process.wait()
            for arm in arms:
                arm.watch()
            while not all(arm.ready() for arm in arms):
                if time.monotonic() - began > START_LIMIT:
                    raise RkspError(f"the watchers did not judge step 0 within {START_LIMIT:g} s; see {output}")
                time.sleep(0.2)
        for arm in arms:
            arm.train()
        follow(arms, console)
    finally:
        for arm in arms:
            arm.stop()
    seconds = time.monotonic() - began
    settings = {"configuration": yaml.name, "seed": seed, "seconds in all": round(seconds)}
    page = output / "demo.html"
    write_atomic(page, write_page(arms, settings))
    print(verdict(*(tell(arm) for arm in arms)))
    print(f"The page: {page}")
    return 0
