"""The console script: tracefl run, trace, audit, whatif, report, list.

Every command finds its answer in `commands`, as a plain dict, and prints it as tables or, with
--json, as strict JSON. Heavy imports wait until the command line is read. Exit statuses: 0 done,
1 an error that the user can correct, 2 a wrong command line, 130 interrupted, 143 terminated.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from tracefl import __version__
from tracefl.errors import TraceFLError, os_sentence

app = typer.Typer(
    name="tracefl",
    help="Which client is responsible for a federated model's prediction?",
    epilog="Exit status: 0 done, 1 an error that you can correct, 2 a wrong command line, 130 interrupted (Ctrl-C), "
    "143 terminated. Every command takes --json; docs/command.md describes the answers.",
    no_args_is_help=True,
    suggest_commands=False,  # click does it
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Method = StrEnum("Method", ["neuron", "influence", "integrated", "shapley"])  # provenance.trace.METHODS
RunName = Annotated[str, typer.Argument(metavar="RUN")]
RUN = "RUN is a run's folder; or its name inside ./logs, without the hash where only one run is called so."
Json = Annotated[bool, typer.Option("--json", help="Print the answer as strict JSON, and nothing else.")]
Number = Annotated[int | None, typer.Option("--round", min=1, help="Whose model it is. Default: the last round's.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tracefl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="[--json]",
)
def run(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the finished runs as strict JSON at the end.")] = False,
) -> None:
    """Train, record and trace: key=value ..., the same as python -m tracefl.main.

    Its settings stand in docs/settings.md; tracefl run --help shows them too. Hydra's flags, such
    as --multirun, pass through.
    """
    if not as_json:
        from tracefl.main import main as job

        return job(context.args)
    from tracefl.commands import running, show

    answer, status = running.run(context.args)
    if status == 0 or answer["runs"]:
        show.print_json(answer)
    raise typer.Exit(status)


@app.command(epilog=RUN)
def trace(
    name: RunName,
    round: Number = None,
    index: Annotated[int | None, typer.Option(min=0, help="Number of an example of the server, from 0.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture of your own.")] = None,
    text: Annotated[str | None, typer.Option(help="A text of your own.")] = None,
    text_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The same in a file, in UTF-8.")] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="CLASS", help="Class to explain: its name, or number from 0. Default: the predicted one."),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(help="influence: first-order effect of leaving it out; shapley: what it adds to coalitions."),
    ] = Method.influence,
    evaluations: Annotated[
        int | None, typer.Option(min=1, help="Models to fuse for shapley; more give standard errors. Default: 2 K + 2.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Who is responsible for one prediction: give --index, or an input of your own."""
    options = {"--index": index, "--image": image, "--text": text, "--text-file": text_file}
    given = [option for option, value in options.items() if value is not None]
    if len(given) != 1:
        raise click.UsageError(f"Give one of {', '.join(options)}, got {', '.join(given) or 'none'}.")
    if evaluations is not None and method != Method.shapley:
        raise click.UsageError(f"--evaluations goes with --method shapley, got --method {method}.")
    folder = _run_folder(name)
    from tracefl.commands import tracing

    asked = tracing.Asked(index, image, text, text_file)
    found = tracing.trace(folder, asked, round, str(method), evaluations, target)
    _tell(found, tracing.tables, as_json)


@app.command(epilog=RUN)
def audit(name: RunName, as_json: Json = False) -> None:
    """The verdict: which clients are faulty, and what every client did."""
    folder = _run_folder(name)
    from tracefl.commands import auditing

    found = auditing.audit(folder)
    _tell(found, auditing.tables, as_json)


@app.command(epilog=RUN)
def whatif(
    name: RunName,
    without: Annotated[list[str], typer.Option(metavar="CLIENT", help="Client to leave out; may be given again.")],
    round: Number = None,
    since: Annotated[
        int | None, typer.Option(min=1, help="First round to fuse without them. Default: only the one.")
    ] = None,
    memory: Annotated[float, typer.Option(min=0, max=1, help="Share of a change that the next round keeps.")] = 1.0,
    as_json: Json = False,
) -> None:
    """What the model would predict without some clients."""
    folder = _run_folder(name)
    from tracefl.commands import removing

    found = removing.whatif(folder, without, round, since, memory)
    _tell(found, removing.tables, as_json)


@app.command(epilog=RUN)
def report(
    names: Annotated[list[str], typer.Argument(metavar="RUN...")],
    out: Annotated[
        Path | None,
        typer.Option(help="File of the page; for several runs a folder. Default: report.html in the run's folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run's page: one file that loads nothing, for any browser."""
    folders = [_run_folder(name) for name in names]
    from tracefl.commands import reporting

    found = reporting.report(folders, out)
    _tell(found, reporting.lines, as_json)


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")] = Path("logs"),
    as_json: Json = False,
) -> None:
    """The runs in FOLDER (default: logs), three levels deep: differing settings, results."""
    if not folder.is_dir():
        raise TraceFLError(f"{folder} is no folder: give one that holds runs")
    from tracefl.commands import listing

    found = listing.runs_in(folder)
    _tell(found, listing.tables, as_json)


def main(typed: Sequence[str] | None = None) -> None:
    """Run what a command line asks for, and end the process.

    Args:
        typed: its words after the program's name; default: those of this process.

    Raises:
        SystemExit: with the exit status.
    """
    nowhere = Path(os.devnull)
    sys.stdout, sys.stderr = sys.stdout or nowhere.open("w"), sys.stderr or nowhere.open("w")  # None after >&-
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names may not fit the terminal's encoding
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(_status(sys.argv[1:] if typed is None else list(typed)))


def _status(typed: list[str]) -> int:
    """The exit status of a command line, whose errors are said in one line each."""
    try:
        status = typer.main.get_command(app).main(typed, prog_name="tracefl", standalone_mode=False)
        sys.stdout.flush()
        if status == 130:
            print("interrupted", file=sys.stderr)
        return status or 0
    except click.ClickException as error:
        context, message = getattr(error, "ctx", None), " ".join(error.format_message().split()).rstrip(".")
        help_of = f"; see {context.command_path} --help" if context else ""
        if message:  # else the help has been shown, in place of a command
            _say(f"{message}{help_of}")
        return error.exit_code
    except TraceFLError as error:
        _say(str(error))
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _say(os_sentence(error, str(Path.cwd())))
    except MemoryError:
        _say("there is not enough memory: end other programs")
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    return 1


def _tell(answer: dict[str, Any], tables: Callable[[dict[str, Any]], Iterable[Any]], as_json: bool) -> None:
    """Print an answer."""
    from tracefl.commands import show

    if as_json:
        show.print_json(answer)
    else:
        show.print_tables(tables(answer))


def _say(sentence: str) -> None:
    from tracefl.commands.show import printable

    print(f"error: {printable(sentence)}", file=sys.stderr)


def _run_folder(name: str) -> Path:
    """The folder of a run that the user has named."""
    from tracefl.commands.find import find_run

    return find_run(name)
