"""What tests of several commands are given."""

import shutil

import pytest


@pytest.fixture(scope="session")
def weightless(small_example, tmp_path_factory):
    """A checkpoint without its weights: whatever is said of it needs none, and what is refused was before them."""
    folder = tmp_path_factory.mktemp("weightless") / "example-vlm"
    shutil.copytree(small_example, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder
