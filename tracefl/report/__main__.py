"""Figures from what is recorded:

    python -m tracefl.report runs='logs/alpha-*' [x=dirichlet_alpha] [out=logs/figures]
    python -m tracefl.report data='logs/data/*' [out=logs/figures]

Draws each run into its own plots/, and all of them together into `out`, beside the table that they
are drawn from; of prepared data it draws how labels are spread over clients.
"""

import os
import sys
from pathlib import Path

from tracefl.errors import TraceFLError, os_sentence, require
from tracefl.report.figures import draw_data, draw_run, draw_runs
from tracefl.report.sweep import find


def main() -> None:
    try:
        arguments = _arguments(sys.argv[1:])
        out = Path(arguments.get("out", "logs/figures"))
        if "data" in arguments:
            draw_data(find("data", arguments["data"], "data.json"), out)
        else:
            for folder in (folders := find("runs", arguments["runs"], "rounds.csv")):
                if os.access(folder, os.W_OK):  # else all of them are drawn together, into `out`
                    draw_run(folder)
            draw_runs(folders, arguments.get("x"), out)
    except TraceFLError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {os_sentence(error, 'out')}")
    print("\n".join(str(file) for file in sorted(out.glob("*.*"))))


def _arguments(words: list[str]) -> dict[str, str]:
    arguments = dict(word.split("=", 1) for word in words if "=" in word)
    source = arguments.keys() & {"runs", "data"}
    require(
        len(arguments) == len(words) and len(source) == 1 and arguments.keys() <= source | {"x", "out"},
        "the arguments must be runs='GLOB' or data='GLOB', with x=SETTING or out=FOLDER after it where wanted, "
        f"got '{' '.join(words)}'",
    )
    return arguments


if __name__ == "__main__":
    main()
