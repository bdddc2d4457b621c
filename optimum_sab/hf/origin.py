"""Where a model comes from, so that everything else of it is read from the same place.

Transformers tells a quantizer which model it fills and not what `from_pretrained` was called with. So the call is
looked up where it is: it is running, and its arguments are in its frame. Nothing of Transformers is changed for that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from optimum_sab.hf.running_call import running_call

_SNAPSHOT = re.compile(r"[/\\]models--[^/\\]+[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")
PLACE = ("revision", "subfolder")
ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "trust_remote_code")
DOWNLOAD = ("revision", "cache_dir", "force_download", "local_files_only", "token")  # of huggingface_hub


@dataclass(frozen=True)
class Origin:
    """A checkpoint, and how it is reached.

    Args:
        name: folder, or Hub repository; empty where it is not known.
        place: where in there: `PLACE`, as far as given.
        access: how to get there: `ACCESS`, as far as given. Also good for other repositories.
        files: the checkpoint's weight files on this machine; None where they are not known.
    """

    name: str
    place: Mapping[str, Any] = field(default_factory=dict)
    access: Mapping[str, Any] = field(default_factory=dict, repr=False)  # holds a token
    files: Sequence[str] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """For any `from_pretrained` that reads from here."""
        return {**self.place, **self.access}

    @property
    def download(self) -> dict[str, Any]:
        """For the functions of huggingface_hub that fetch from here."""
        return {name: value for name, value in self.arguments.items() if name in DOWNLOAD}

    def at(self, other: str | os.PathLike[str]) -> Origin:
        """What is reached the same way: this one under its own name, or another repository as it is by default."""
        return self if os.fspath(other) == self.name else Origin(os.fspath(other), access=self.access)

    @classmethod
    def of(cls, name: str | os.PathLike[str], arguments: Mapping[str, Any]) -> Origin:
        """Of a call ``from_pretrained(name, **arguments)``; arguments that say nothing are left out."""
        given = {key: value for key, value in arguments.items() if value not in (None, "", False)}
        place, access = ({k: given[k] for k in names if k in given} for names in (PLACE, ACCESS))
        return cls(os.fspath(name), place, access)


def origin_of(model: nn.Module) -> Origin:
    """The origin of a model that `from_pretrained` is loading, or of one that it has loaded.

    The commit is taken rather than the branch it was looked up from, which may have moved since.
    """
    config: Any = getattr(model, "config", None)
    call = loading_call()
    if call is None:
        return Origin(getattr(config, "_name_or_path", "") or "")
    revision, files = call.get("revision"), call.get("checkpoint_files")
    # Transformers 5.24 has looked the revision up by now; 4.57 has left the commit in the config, or nowhere but in
    # the paths, as for Qwen2.5-VL
    commit = getattr(revision, "resolved", None) or getattr(config, "_commit_hash", None) or _commit_of(files)
    found = Origin.of(call.get("pretrained_model_name_or_path") or "", {**call, "revision": commit or revision})
    return Origin(found.name, found.place, found.access, None if files is None else tuple(map(str, files)))


def loading_call() -> Mapping[str, Any] | None:
    """The variables of the innermost `PreTrainedModel.from_pretrained` that is running; None where none is."""
    return running_call(PreTrainedModel.from_pretrained)


def _commit_of(files: Sequence[str] | None) -> str | None:
    """The commit that the Hub's cache has in the paths of its files."""
    found = _SNAPSHOT.search(str(next(iter(files or ()), "")))
    return None if found is None else found[1]
