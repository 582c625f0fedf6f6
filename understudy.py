"""The command line: dispatches, and imports each command's package only when it is used."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from serving.errors import UnderstudyError

app = typer.Typer(
    name="understudy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line. What we raise on purpose becomes one line on stderr and exit code 2."""
    try:
        app(prog_name="understudy")
    except UnderstudyError as error:
        print(f"understudy: {error}", file=sys.stderr)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"understudy {version('understudy')}")
        except PackageNotFoundError:
            print("understudy (a checkout that isn't installed)")
        raise typer.Exit


@app.callback()
def understudy(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Answer OpenAI-compatible requests with a small student where it provably agrees with the teacher."""


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="The configuration file; absent: understudy.toml, if there is one.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; absent: server.host.")] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one; absent: server.port."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, help="Processes that serve; absent: server.workers.")
    ] = None,
) -> None:
    """Run the gateway."""
    from gateway.server import serve as run_gateway
    from serving.settings import load_settings

    settings = load_settings(config)
    given = {"host": host, "port": port, "workers": workers}
    server = settings.server.model_copy(
        update={key: value for key, value in given.items() if value is not None}
    )
    run_gateway(settings.model_copy(update={"server": server}), config_path=config)


@app.command("stand-in")
def stand_in(
    file: Annotated[Path, typer.Argument(help="The recording: CSV or JSONL with columns text and teacher.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8090,
    latency_ms: Annotated[
        float | None, typer.Option(min=0, help="Median time of an answer; absent: as recorded, else none.")
    ] = None,
    latency_spread: Annotated[float, typer.Option(min=0, help="σ of the latency's logarithm.")] = 0.3,
    model: Annotated[str | None, typer.Option(help="Name to answer under; absent: the recording's.")] = None,
    answers: Annotated[
        str, typer.Option(help="Column that holds the answers: teacher or gold.", metavar="COLUMN")
    ] = "teacher",
    default: Annotated[
        str | None, typer.Option(help="Answer to texts that aren't in the recording; absent: 404.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the API key that clients must send.")
    ] = None,
    fail_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that get a 500.")] = 0.0,
    script: Annotated[Path | None, typer.Option(help="Scripted failures: JSONL, one rule a line.")] = None,
) -> None:
    """Answer chat completions from a recording, as a teacher for demos, tests and load tests."""
    from serving.errors import ConfigError
    from serving.failures import Failures, read_script
    from serving.recording import read_recording
    from serving.stand_in import create_stand_in, serve_stand_in

    key = os.environ.get(api_key_env, "") if api_key_env is not None else None
    if key == "":
        raise ConfigError(f"the environment variable {api_key_env} (--api-key-env) is not set")
    if answers not in ("teacher", "gold"):
        raise ConfigError(f"--answers must be teacher or gold, got {answers!r}")
    app = create_stand_in(
        read_recording(file, answers="gold" if answers == "gold" else "teacher"),
        model=model,
        latency_ms=latency_ms,
        latency_spread=latency_spread,
        default=default,
        api_key=key,
        failures=Failures(read_script(script) if script is not None else (), rate=fail_rate),
    )
    serve_stand_in(
        app,
        host=host,
        port=port,
        announce=lambda url: print(f"stand-in: {app.answers} answers on {url}", flush=True),
    )


if __name__ == "__main__":
    main()
