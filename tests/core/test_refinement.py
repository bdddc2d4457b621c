"""Settings of the refinement: bad values are rejected by name."""

import pytest

from optimum_sab.core.refinement import RefineSettings
from optimum_sab.errors import ConfigError


@pytest.mark.parametrize(("name", "value"), [("epochs", -1), ("epochs", 1.0), ("steps", "5"), ("steps", True)])
def test_refine_settings_reject_a_bad_value(name, value):
    with pytest.raises(ConfigError, match=f"refine_{name}={value!r}"):
        RefineSettings(**{name: value})


def test_refine_settings_need_something_to_do():
    with pytest.raises(ConfigError, match="refine=False"):
        RefineSettings(epochs=0, steps=0)
    assert RefineSettings(epochs=0, steps=1).steps == 1
