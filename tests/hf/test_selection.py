"""What a packed checkpoint says was left dense is left dense when it is loaded, and nothing else."""

import pytest
from torch import nn

from optimum_sab import SABConfig
from optimum_sab.errors import ConfigError
from optimum_sab.hf.selection import select


class Decoder(nn.Module):
    """Two blocks of a mixture whose router is a module."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self._block() for _ in range(2))

    def _block(self):
        block = nn.Module()
        block.up_proj = nn.Linear(16, 32)
        block.router = nn.ModuleDict({"layer": nn.Linear(16, 4)})
        block.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(4))
        return block


def test_routers_are_left_dense_when_binarizing():
    assert select(Decoder(), SABConfig(), strict=True).left_dense == ("layers.0.router.layer", "layers.1.router.layer")


def test_a_checkpoint_whose_routers_were_binarized_is_read_as_it_was_written():
    """Up to release 0.1 a router one module below was binarized: its tensors are packed in such a checkpoint."""
    config = SABConfig(measured={"left_dense": ["layers.0.up_proj"]})
    found = select(Decoder(), config, strict=False)
    assert found.left_dense == ("layers.0.up_proj",)
    assert "layers.0.router.layer" in found.settings


def test_a_checkpoint_without_a_record_is_read_by_the_rules_of_today():
    found = select(Decoder(), SABConfig(), strict=False)
    assert found.left_dense == ("layers.0.router.layer", "layers.1.router.layer")


@pytest.mark.parametrize("key", ["dynamic", "modules_to_not_convert"])
def test_a_stored_rule_that_would_take_long_is_refused_when_the_configuration_is_read(key):
    rule = "((.*)*)*X"
    stored = {"dynamic": {rule: {"base_planes": 2}}, "modules_to_not_convert": [f"re:{rule}"]}
    with pytest.raises(ConfigError, match=r"takes .* steps to search"):
        SABConfig.from_dict({"quant_method": "sab", key: stored[key]})
