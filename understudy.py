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
    except OSError as error:  # the disk's: the message names the file
        print(f"understudy: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
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
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Also run a vLLM, as [student.vllm] says, for as long.")
    ] = False,
) -> None:
    """Run the gateway."""
    from serving.configuration import load_settings
    from serving.settings import Settings
    from serving.vllm_command import check_vllm

    options = {"host": host, "port": port, "workers": workers}
    given = {key: value for key, value in options.items() if value is not None}

    def read() -> Settings:
        settings = load_settings(config)
        if vllm:
            check_vllm(settings)
        return settings.model_copy(update={"server": settings.server.model_copy(update=given)})

    settings = read()
    # Only now: what is wrong with the configuration is said at once.
    from gateway.server import serve as run_gateway

    run_gateway(settings, config_path=config, reread=read, with_vllm=vllm)


@app.command("stand-in", short_help="Answer chat completions from a recording, as a teacher.")
def stand_in(
    file: Annotated[Path, typer.Argument(help="The recording: CSV or JSONL with columns text and teacher.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8090,
    latency_ms: Annotated[
        float | None, typer.Option(min=0, help="Median time of an answer; absent: as recorded, else none.")
    ] = None,
    latency_spread: Annotated[float, typer.Option(min=0, help="σ of the latency's logarithm.")] = 0.3,
    tokens_per_s: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-second",
            min=0.01,
            help="Tokens a second after the first, for which the latency stands then; absent: all within it.",
        ),
    ] = None,
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
    """Answer chat completions from a recording, as a teacher for demos, tests and load tests.

    It plays a student as well: where the recording has a column confidence (a probability above 0, at most 1), those
    who ask for log-probabilities get some whose geometric mean it is. A column logprobs holds them as they are.

    Failures come by --fail-rate, by --script, by POST /failures with a script while it runs, or by a request's
    header x-stand-in, such as "status=429;retry-after=1". Their names: status, retry-after, stall, hang-after,
    break-after, reset-after, drip, send=truncated|garbage|empty|short-length|noise, times. A rule of a script
    is a JSON object of those (with _ for -) and of the requests it is for: text, every, from, to, share,
    beyond_per_s.
    """
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
        tokens_per_s=tokens_per_s,
    )
    serve_stand_in(
        app,
        host=host,
        port=port,
        announce=lambda url: print(f"stand-in: {app.answers} answers on {url}", flush=True),
    )


@app.command(short_help="Send a recording through a gateway as real requests.")
def replay(
    file: Annotated[Path, typer.Argument(help="The recording: CSV or JSONL with columns text and teacher.")],
    base_url: Annotated[
        str | None, typer.Option(help="A running gateway, ending in /v1; absent: one is started for this.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration of the gateway at --base-url, to learn and read its log."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task to name in x-understudy-task.")] = None,
    system_prompt: Annotated[Path | None, typer.Option(help="File with the system prompt to send.")] = None,
    answers: Annotated[
        str, typer.Option(help="Column with the recorded answers: teacher or gold.", metavar="COLUMN")
    ] = "teacher",
    seed: Annotated[int | None, typer.Option(help="Shuffles the rows; absent: the file's order.")] = None,
    seed_file: Annotated[
        Path | None, typer.Option(help="Rows text,gold sent first, answered with gold, and not counted.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Send only so many rows.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=512, help="Requests under way at once.")] = 4,
    learn_every: Annotated[int, typer.Option(min=0, help="Run `learn` after every so many; 0: never.")] = 0,
    wait: Annotated[bool, typer.Option(help="Stop sending while learning; else traffic goes on.")] = True,
    max_disagreement: Annotated[
        float | None, typer.Option("--max-disagreement", "--alpha", help="α of the promise. [default: 0.05]")
    ] = None,
    certainty: Annotated[float | None, typer.Option(help="1−δ of the promise. [default: 0.9]")] = None,
    price: Annotated[
        str, typer.Option(help="The teacher's price, USD per million tokens of input,output.")
    ] = "2.5,10",
    latency_ms: Annotated[
        float | None, typer.Option(min=0, help="Median time of a teacher's answer; absent: as recorded.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for; absent: the recording's.")] = None,
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable with the key for --base-url, if it wants one.")
    ] = "OPENAI_API_KEY",
    work: Annotated[
        Path | None,
        typer.Option(help="Folder to keep configuration, log and releases in; absent: none kept."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")] = False,
) -> None:
    """Send a recording through a gateway as real requests, and show what came of it."""
    from loadtest.command import ReplayOptions, run_replay

    options = ReplayOptions(
        file=file,
        base_url=base_url,
        config=config,
        task=task,
        system_prompt=system_prompt,
        answers=answers,
        seed=seed,
        seed_file=seed_file,
        limit=limit,
        concurrency=concurrency,
        learn_every=learn_every,
        wait=wait,
        max_disagreement=max_disagreement,
        certainty=certainty,
        price=price,
        latency_ms=latency_ms,
        model=model,
        api_key_env=api_key_env,
        work=work,
    )
    raise typer.Exit(run_replay(options, as_json=json))


@app.command()
def demo(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the gateway.")] = 8080,
    state: Annotated[Path, typer.Option(help="Folder for the demo's state; emptied first.")] = Path(
        "demo-state"
    ),
    seed: Annotated[int, typer.Option(help="Shuffles the messages.")] = 1,
    leave: Annotated[bool, typer.Option("--exit", help="Stop after the table.")] = False,
) -> None:
    """Show the main job on example messages, then go on serving."""
    from rich.console import Console

    from loadtest.demo import Demo, run_demo

    results = run_demo(Demo(port, state, seed), Console(), stay=not leave)
    raise typer.Exit(130 if results.interrupted else 1 if results.failed else 0)


_Config = Annotated[
    Path | None,
    typer.Option("--config", help="The configuration file; absent: understudy.toml, if there is one."),
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(short_help="List the tasks in the traffic: which are worth a student?")
def tasks(config: _Config = None, json: _AsJson = False) -> None:
    """List the tasks found in the traffic: volume, answers, spend, and whether a student looks worth it.

    Prompts that look like one template filled in anew are reported with a rule that makes them one task.
    """
    from distillation.console import print_json, print_tasks
    from distillation.economics import summarise
    from distillation.prompts import Prompts
    from distillation.templates import find_templates
    from serving.configuration import load_settings
    from serving.rules import Rules

    settings = load_settings(config)
    prompts = Prompts(Rules(settings))
    summaries = summarise(settings, prompts)
    templates = find_templates(prompts.all())
    if json:
        tasks = [summary.to_json() for summary in summaries]
        print_json({"tasks": tasks, "templates": [template.to_json() for template in templates]})
    else:
        print_tasks(summaries, templates, prompts.named)


@app.command(short_help="Train the next student; release it if it keeps the promise.")
def learn(
    config: _Config = None,
    task: Annotated[
        str | None, typer.Option(help="Learn only this task; absent: every task with a log.")
    ] = None,
    json: _AsJson = False,
    quiet: Annotated[bool, typer.Option(help="No progress line.")] = False,
    unattended: Annotated[
        bool,
        typer.Option(help="As the gateway does it: a fine-tuning that failed isn't tried again for an hour."),
    ] = False,
) -> None:
    """Train the next student from the log, look at its promise, and release it if it keeps it."""
    from distillation.console import print_json, print_lessons, progress_line
    from distillation.learning import learn as learn_tasks
    from serving.configuration import load_settings

    with progress_line(quiet or json) as progress:
        lessons = learn_tasks(load_settings(config), task, progress=progress, unattended=unattended)
    if json:
        print_json({"tasks": [lesson.to_json() for lesson in lessons]})
    else:
        print_lessons(lessons)


@app.command(short_help="Say how good a release is, and what it costs.")
def evaluate(
    task: Annotated[str, typer.Argument(help="The task.")],
    release: Annotated[
        str | None, typer.Option(help="The release to evaluate, as r0001; absent: the live one.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="A recording to judge by too: CSV or JSONL with columns text, teacher and, if known, gold."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with the plots to this file (needs the extra `report`).", metavar="FILE"
        ),
    ] = None,
    config: _Config = None,
    json: _AsJson = False,
) -> None:
    """Say how good a release is, by the log's labels and a recording: risk, coverage, calibration, cost.

    No label judges a release that was fitted on it.
    """
    from distillation.console import print_json, progress_line
    from distillation.evaluate import evaluate as evaluate_release
    from distillation.evaluation_file import page_writer
    from distillation.evaluation_table import print_evaluation
    from serving.configuration import load_settings
    from serving.recording import read_recording

    settings = load_settings(config)
    write_page = page_writer(html) if html is not None else None  # what is missing for it is said at once
    recording = read_recording(file) if file is not None else None
    with progress_line(json, "evaluating") as progress:
        evaluation = evaluate_release(settings, task, release, recording, progress=progress)
    if write_page is not None:
        write_page(evaluation)
    if json:
        print_json(evaluation.to_json())
    else:
        print_evaluation(evaluation)
        if html is not None:
            print(f"with its plots: {html}")


@app.command(short_help="Make a release live.")
def promote(
    task: Annotated[str, typer.Argument(help="The task.")],
    release: Annotated[str, typer.Argument(help="The release to make live, as r0001.")],
    config: _Config = None,
    json: _AsJson = False,
) -> None:
    """Make a release live. Gateways take it in within a second, without a restart."""
    from distillation.console import print_live
    from serving.configuration import load_settings
    from serving.releases import ReleaseStore

    print_live(task, ReleaseStore(load_settings(config).state_dir).set_live(task, release), json)


@app.command(short_help="Go back to the release before, or to the teacher alone.")
def rollback(
    task: Annotated[str, typer.Argument(help="The task.")],
    config: _Config = None,
    json: _AsJson = False,
) -> None:
    """Go back to the release before, or to the teacher alone if there was none."""
    from distillation.console import print_live
    from serving.configuration import load_settings
    from serving.releases import ReleaseStore

    print_live(task, ReleaseStore(load_settings(config).state_dir).rollback(task), json)


@app.command(short_help="Erase somebody's exchanges from the log.")
def forget(
    tenant: Annotated[
        str | None, typer.Option(help="Whose: a tenant as the log names it, 16 hex digits or `anonymous`.")
    ] = None,
    key_env: Annotated[
        str | None, typer.Option(help="Whose: the environment variable that holds the tenant's key.")
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(help="Whose: an end user, by `user`, `safety_identifier` or metadata.user_id."),
    ] = None,
    config: _Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be erased, and erase nothing.")
    ] = False,
    json: _AsJson = False,
) -> None:
    """Erase a tenant's or an end user's exchanges from the log, and name the releases trained on them."""
    from dataclasses import asdict

    from distillation.console import print_erasure, print_json, progress_bar
    from serving.configuration import load_settings
    from serving.errors import ConfigError
    from serving.forgetting import Whose
    from serving.forgetting import forget as erase
    from serving.redaction import Redactor
    from serving.tenant import is_tenant, tenant_of

    settings = load_settings(config)
    if tenant is not None and key_env is not None:
        raise ConfigError("--tenant and --key-env both name a tenant; give one of them")
    if tenant is not None and not is_tenant(tenant):
        raise ConfigError(
            "--tenant should be 16 hex digits as in the log, or anonymous; a key goes into an environment variable, "
            "which --key-env names"
        )
    if key_env is not None:
        key = os.environ.get(key_env, "").strip()
        if not key:
            raise ConfigError(f"the environment variable {key_env} (--key-env) is not set")
        tenant = tenant_of(key)
    if tenant is None and not user:
        raise ConfigError("whose exchanges? Give --tenant, --key-env or --user")
    if user and Redactor(settings.log.redact).text(user) != user:
        raise ConfigError(
            "this --user is of a kind that log.redact keeps out of the log, so it can't be found there; "
            "erase by tenant, or by an id that isn't redacted"
        )
    with progress_bar(json, "forgetting") as progress:
        erasure = erase(settings.state_dir, Whose(tenant, user), dry_run=dry_run, progress=progress)
    if json:
        print_json({"dry_run": dry_run, **asdict(erasure)})
    else:
        print_erasure(erasure, dry_run=dry_run, cache_ttl_s=settings.cache.ttl_s)
    raise typer.Exit(1 if erasure.left else 0)


@app.command(short_help="Check the configuration against teacher, students, Redis and disk.")
def doctor(
    config: _Config = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Ask the teacher for one token, which costs what it costs.")
    ] = False,
    json: _AsJson = False,
) -> None:
    """Check the configuration against the real teacher, students, Redis and disk, and say what to mend."""
    from serving.configuration import DEFAULT_FILE, load_settings

    settings = load_settings(config)
    from gateway.doctor import examine, is_fit, print_findings

    findings = examine(settings, file=config or DEFAULT_FILE, ask=ask)
    print_findings(findings, as_json=json)
    raise typer.Exit(0 if is_fit(findings) else 1)


if __name__ == "__main__":
    main()
