"""``merak serve``: host the cloud's half of a model, or blocks of one that generates."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merak_like.cli.halves import half_source

if TYPE_CHECKING:
    from merak_like.split.host import Host


def run(
    model: Annotated[str, typer.Option("--model", help="Folder with config.json and safetensors, or module:function.")],
    cut: Annotated[str, typer.Option("--cut", help="FRONT[@RANK][:BACK], module paths; see docs/split.md.")] = "",
    generate: Annotated[
        str,
        typer.Option("--generate", help="FIRST:STOP, blocks to generate with, instead of --cut; see docs/split.md."),
    ] = "",
    listen: Annotated[
        str, typer.Option("--listen", help="HOST:PORT or grpc://HOST:PORT; port 0 takes a free one.")
    ] = "127.0.0.1:7750",
    state: Annotated[Path, typer.Option("--state", help="Folder of sessions and the audit log.")] = Path("host"),
    groups: Annotated[
        Path | None, typer.Option("--groups", help="YAML of clients that train one half together; see docs/split.md.")
    ] = None,
    keys: Annotated[Path | None, typer.Option("--keys", help="Folder of `merak keys`.")] = None,
    name: Annotated[str, typer.Option("--name", help="This host's certificate in that folder.")] = "host",
    insecure: Annotated[bool, typer.Option("--insecure", help="Everything in the clear, for anyone.")] = False,
    status: Annotated[str | None, typer.Option("--status", help="HOST:PORT of /healthz and /metrics.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Of a config.json: causal-lm, ...")] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="Safetensors elsewhere than in MODEL.")] = None,
    fisher: Annotated[
        Path | None, typer.Option("--fisher", help="File of `merak edge fisher`, for cuts whose edges weigh by it.")
    ] = None,
    memory: Annotated[float, typer.Option("--memory", help="GB for all sessions together.")] = 8.0,
    sessions: Annotated[int, typer.Option("--sessions", help="Most sessions in memory.")] = 64,
    sessions_per_client: Annotated[int, typer.Option("--sessions-per-client")] = 4,
    together: Annotated[
        int, typer.Option("--together", help="Most sessions with adapters that go through the trunk in one pass.")
    ] = 1,
    rate: Annotated[float, typer.Option("--rate", help="Bytes a second taken from one connection; 0: any.")] = 0.0,
    dp: Annotated[int, typer.Option("--dp", help="Replicas of the half, under torchrun.")] = 1,
    tp: Annotated[int, typer.Option("--tp", help="Ranks that have parts of each weight, under torchrun.")] = 1,
    device: Annotated[str, typer.Option("--device")] = "cpu",
) -> None:
    """Listen for edges and train the cloud's half of each one's session. SIGTERM ends steps and saves sessions.

    Under torchrun the half is on all ranks, of which the first listens: --dp x --tp, and a pipeline of what is left.
    With --generate, listen for `merak generate` instead and run these blocks of a causal language model; --memory is
    then for keys and values.
    """
    if bool(cut) == bool(generate):
        raise ValueError("give either --cut, to train with edges, or --generate, to run blocks for those that generate")
    from merak_like.partitioner.mesh import Mesh
    from merak_like.runtime.initialize import join, world_size
    from merak_like.split.connection import Waits
    from merak_like.split.crew import Crew
    from merak_like.split.cut import Cut
    from merak_like.split.groups import read_groups
    from merak_like.split.helper import Helper
    from merak_like.split.host import Host
    from merak_like.split.limits import Limits
    from merak_like.split.order import stage_rank
    from merak_like.split.tls import Keys

    source, waits = replace(half_source(model, task=task, weights=weights), fisher=fisher), Waits()
    ranks = world_size()
    limits = Limits(
        memory=int(memory * 2**30),
        sessions=sessions,
        sessions_per_client=sessions_per_client,
        rate=rate,
        waits=waits,
        together=together,
    )
    common: dict[str, Any] = {
        "listen": listen, "folder": state, "keys": Keys(keys, name) if keys is not None else None,
        "insecure": insecure, "status": status, "limits": limits,
    }  # fmt: skip
    if generate:
        from merak_like.cli.generate import span
        from merak_like.split.blocks.serving import BlockHost

        if ranks > 1 or dp * tp > 1:
            raise ValueError(
                f"--generate runs on one rank, not {max(ranks, dp * tp)}: start a host for some blocks on each"
            )
        _until_drained(BlockHost(source, *span(generate, "--generate"), device=device, **common))
        typer.echo("drained")
        return
    mesh = Mesh(dp, max(1, ranks // max(1, dp * tp)), tp)
    world = join(mesh, timeout=2 * waits.step + 120, device=None if device == "cuda" else device)
    crew = Crew(world, stage_rank("host", Cut.parse(cut), mesh.pp), mesh)
    if world.rank:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the first rank says when it is over
        Helper(source, crew, world.device).run()
        return
    known = read_groups(groups) if groups is not None else None
    _until_drained(Host(source, cut, crew=crew, device=world.device, groups=known, **common))
    typer.echo("drained: every session is on disk")


def _until_drained(host: Host) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: host.drain())
    host.run(_ready)


def _ready(host: Host) -> None:
    typer.echo(
        f"listening on {host.place._replace(port=host.port)}"
        + (f", status on {host.status_port}" if host.status_port else "")
    )
    sys.stdout.flush()  # whoever starts hosts waits for this line
