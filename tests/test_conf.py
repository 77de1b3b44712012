"""base.yaml and docs/settings.md say what the schema says."""

import pytest
from omegaconf import OmegaConf

from docs.write_settings import BASE, SETTINGS, WIDTH, base_yaml, settings_md
from tracefl.config import ALIASES, WITHOUT_EFFECT, Config, leaves

KEYS = [key for key, _ in leaves()]


@pytest.mark.parametrize(("file", "text"), [(BASE, base_yaml()), (SETTINGS, settings_md())])
def test_the_written_files_are_those_of_the_schema(file, text):
    assert file.read_text() == text, "run: python docs/write_settings.py"


def test_base_yaml_holds_every_default_and_nothing_else():
    written = OmegaConf.to_container(OmegaConf.load(BASE))
    assert {key: value for key, value in written.items() if key not in ("defaults", "hydra")} == (
        OmegaConf.to_container(OmegaConf.structured(Config))
    )


def test_every_setting_is_explained_in_short_lines():
    assert [key for key, field in leaves() if not field.metadata["help"]] == []
    assert [line for line in base_yaml().splitlines()[1:] if len(line) > WIDTH] == []


def test_the_table_lists_every_setting_alias_and_key_without_effect_once():
    table = settings_md()
    for key in KEYS:
        assert table.count(f"| `{key}` |") == 1 + list(ALIASES.values()).count(key), key
    for alias, key in ALIASES.items():
        assert f"| `{alias}` | `{key}` |" in table
    assert all(f"`{key}`" in table for key in WITHOUT_EFFECT)


def test_an_alias_stands_for_a_setting_and_is_none_itself():
    assert set(ALIASES.values()) <= set(KEYS)
    assert not (ALIASES.keys() | set(WITHOUT_EFFECT)) & set(KEYS)
