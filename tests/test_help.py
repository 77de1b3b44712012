"""Help and wrong arguments are answered at once, and the documented commands are commands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import typer

from tracefl import cli

PAGE = Path(__file__).parents[1] / "docs" / "command.md"


def test_help_and_wrong_arguments_are_answered_without_heavy_imports(tmp_path):
    code = (
        "import sys\nfrom tracefl import cli\n"
        "for words in (['--help'], ['trace', '--help'], ['audit'], ['trace', 'x', '--index', 'y'],"
        " ['audit', 'nothing'], ['list', 'nowhere'], ['run', 'numclients=3'], ['--version'], ['bogus']):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'flwr', 'datasets', 'pandas', 'numpy', 'ray'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    path = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_documented_commands_are_commands():
    lines = re.findall(r"^\$ tracefl (.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert {line.split()[0] for line in lines} == {"trace", "audit", "whatif", "list"}
    group = typer.main.get_command(cli.app)
    for line in lines:
        name, *words = shlex.split(line)
        group.commands[name].make_context(name, words)  # raises where an option is wrong
