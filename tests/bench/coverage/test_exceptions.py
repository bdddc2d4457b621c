"""The table of exceptions names families, entries and arguments that exist."""

import inspect

import pytest
import transformers

from optimum_sab.bench.coverage.exceptions import TABLE, exceptions_of
from optimum_sab.bench.coverage.families import SOUND, TEXT, all_families, find_families
from optimum_sab.errors import ConfigError

FAMILIES = {family.name: family for family in all_families()}
NEWEST = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
needs_newest = pytest.mark.skipif(not NEWEST, reason="lines before 5.24 lack some families and entries")


@needs_newest
def test_every_row_is_of_a_family_that_exists():
    assert set(TABLE) - set(FAMILIES) == set()
    assert {*TEXT, *SOUND} - set(FAMILIES) == set()


@pytest.mark.parametrize("name", TABLE if NEWEST else ())
def test_every_entry_of_a_row_is_one_of_the_family_s_configuration(name):
    exceptions = exceptions_of(name)
    default = FAMILIES[name].config_class(**exceptions.default).to_dict()
    for path in exceptions.config:
        part = default
        for key in path.split("."):
            assert key in part, path
            part = part[key]


@pytest.mark.parametrize("name", TABLE if NEWEST else ())
def test_every_argument_of_a_row_is_one_of_the_family_s_forward(name):
    exceptions = exceptions_of(name)
    names = set(inspect.signature(FAMILIES[name].model_class.forward).parameters)
    given = {*exceptions.picture, *exceptions.beside_picture, *exceptions.sound, *exceptions.always}
    assert given - names - {"pixel_values"} == set()  # which a row may leave out, where there is none


def test_families_are_found_by_name_in_the_mapping_s_order():
    names = [family.name for family in find_families(["qwen2_5_vl", "llama", "llava"])]
    assert names == ["llava", "qwen2_5_vl", "llama"]
    assert find_families() == all_families()


def test_family_that_does_not_exist_is_refused_with_what_is_close():
    with pytest.raises(ConfigError, match="no family 'llavva' that is tried; did you mean 'llava'"):
        find_families(["llavva"])


def test_all_of_the_mapping_is_tried_and_sound_and_text_besides():
    kinds = {(family.pictures, family.sound) for family in all_families()}
    assert kinds >= {(True, False), (False, True), (False, False)}
    assert len({family.name for family in all_families()}) == len(all_families())
