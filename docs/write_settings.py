"""Write conf/base.yaml and docs/settings.md from the schema: python docs/write_settings.py"""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from tracefl.config import ALIASES, WITHOUT_EFFECT, Config, leaves

BASE = Path(__file__).parents[1] / "tracefl" / "conf" / "base.yaml"
SETTINGS = Path(__file__).with_name("settings.md")
WIDTH = 100
# Headings of the settings outside of groups, by the first one below each.
SECTIONS = {
    "exp_key": "The run and its federation",
    "noise_multiplier": "Differential privacy by the server (Flower's fixed clipping)",
    "total_cpus": "Resources",
    "faulty_clients_ids": "Faults",
    "dry_run": "What is done",
    "enable_beta": "Tracing",
    "do_feddebug": "FedDebug, the method that TraceFL is compared with",
}

HEAD = """\
# Every setting of TraceFL with its default. Override: python -m tracefl.main num_rounds=3
# Written from tracefl/config.py by python docs/write_settings.py: change it there.
defaults:
  - _self_
  - override hydra/job_logging: none # the package logs for itself
  - override hydra/hydra_logging: none
"""
TAIL = """
hydra:
  output_subdir: null
  run: {dir: .}
  sweep: {dir: "${storage.dir}", subdir: .}
  job: {chdir: false}
"""
TABLE_HEAD = """\
# Settings

Set any of them on the command line, as in `python -m tracefl.main num_rounds=3 dataset.name=mnist`. A list of
values with `--multirun` is a sweep: `dirichlet_alpha=0.1,1`. This page is written from `tracefl/config.py` by
`python docs/write_settings.py`.

Settings marked ● can change a trained weight: another value is another run, in another folder.
"""


def base_yaml() -> str:
    """The text of conf/base.yaml."""
    return HEAD + "\n".join(_yaml_lines(Config, "")) + "\n" + TAIL


def settings_md() -> str:
    """The text of docs/settings.md."""
    lines = [TABLE_HEAD, *_table(), "", "## Other spellings", ""]
    lines += ["The original has some settings twice. Both spellings are accepted; give one of the two.", ""]
    lines += ["| spelling | setting |", "|---|---|"]
    lines += [f"| `{alias}` | `{key}` |" for alias, key in ALIASES.items()]
    keys = ", ".join(f"`{key}`" for key in WITHOUT_EFFECT)
    return "\n".join([*lines, "", "## Keys without effect", "", f"Accepted, and read by nothing: {keys}.", ""])


def _yaml_lines(schema: Any, indent: str) -> Iterator[str]:
    for entry in fields(schema):
        if is_dataclass(entry.type):
            yield from ("", f"# {entry.type.__doc__}", f"{entry.name}:", *_yaml_lines(entry.type, "  "))
            continue
        if schema is Config and entry.name in SECTIONS:
            yield from ("", f"# {SECTIONS[entry.name]}")
        line, help = f"{indent}{entry.name}: {_default(entry)}", _help(entry)
        if len(f"{line} # {help}") <= WIDTH:
            yield f"{line} # {help}"
        else:
            yield from textwrap.wrap(help, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            yield line


def _table() -> Iterator[str]:
    for title, block in _blocks():
        yield from ("", f"## {title}", "", "| setting | default | | what it does |", "|---|---|---|---|")
        for key, entry in block:
            mark, help = "●" if entry.metadata["trains"] else "", _help(entry).replace("|", "\\|")
            yield f"| `{key}` | `{_default(entry)}` | {mark} | {help} |"


def _blocks() -> Iterator[tuple[str, list[tuple[str, Field[Any]]]]]:
    """Settings under their heading: their group's docstring, or the last of SECTIONS."""
    groups = {entry.name: entry.type.__doc__ for entry in fields(Config) if is_dataclass(entry.type)}
    blocks: dict[str, list[tuple[str, Field[Any]]]] = {}
    section = ""
    for key, entry in leaves():
        section = SECTIONS.get(key, section)
        blocks.setdefault(groups.get(key.split(".")[0], section) or "", []).append((key, entry))
    yield from blocks.items()


def _default(entry: Field[Any]) -> str:
    return json.dumps(entry.default_factory()).replace('"', "")


def _help(entry: Field[Any]) -> str:
    """What a setting does, and what its value must be."""
    rule = entry.metadata["rule"]
    return entry.metadata["help"] + (f"; must {rule.must}" if rule else "")


if __name__ == "__main__":
    BASE.write_text(base_yaml())
    SETTINGS.write_text(settings_md())
    print(f"wrote {BASE.name} and {SETTINGS.name}")
