"""``merak keys``: certificates for split fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    action: Annotated[str, typer.Argument(help="init, issue, revoke or list.")],
    name: Annotated[str, typer.Argument(help="Who the certificate is for.")] = "",
    folder: Annotated[Path, typer.Option("--folder", "-f", help="Where the keys are.")] = Path("keys"),
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="A name or address that edges dial; makes it a host's certificate."),
    ] = None,
    days: Annotated[
        float | None, typer.Option("--days", help="How long it is valid. [default: 30; 3650 for init]")
    ] = None,
) -> None:
    """Make an authority, issue certificates to hosts and clients, revoke them.

    merak keys init; merak keys issue host --host cloud.example.org; merak keys issue clinic-7; merak keys list
    """
    from merak_like.split import keys

    if action in ("issue", "revoke") and not name:
        raise ValueError(f"merak keys {action} needs a name, such as clinic-7")
    match action:
        case "init":
            typer.echo(
                f"made {keys.init(folder, days=int(days or 3650))}; keep {folder / 'ca.key'} where you issue from"
            )
        case "issue":
            path = keys.issue(folder, name, hosts=host or (), days=keys.DAYS if days is None else days)
            typer.echo(f"made {path} and {path.with_suffix('.key')}; give them with {folder / 'ca.pem'} to {name}")
        case "revoke":
            typer.echo(f"revoked {keys.revoke(folder, name):x}; hosts that read {folder} refuse it from now on")
        case "list":
            for line in keys.listed(folder):
                typer.echo(line)
        case _:
            raise ValueError(f"no action {action!r}: there are init, issue, revoke and list")
