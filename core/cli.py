"""How every command line of the house ends: an error raised on purpose is one sentence and exit code 2."""

from __future__ import annotations

from collections.abc import Callable

from core.errors import TenfoldError


def run(app: Callable[[], object], name: str) -> None:
    """Run a typer app as the program `name`; an interrupt is exit code 130, as in every shell."""
    try:
        app()
    except TenfoldError as error:
        from rich.console import Console

        Console(stderr=True, highlight=False).print(f"[bold red]{name}:[/] {error}", soft_wrap=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
