"""Which arguments a model's forward understands: `**kwargs` swallows a mistyped one without a word."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

from torch import Tensor, nn

from optimum_sab.calibration.samples.encoding import Encoding, encode_sample, takes_pictures
from optimum_sab.data.unseen import unseen_chats, unseen_texts
from optimum_sab.errors import SABError, SampleError, warn
from optimum_sab.wording import nearest

_ANY = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
_PARTS = ("tokenizer", "image_processor", "video_processor", "feature_extractor", "audio_processor")
_PROBED = 64  # tokens


@dataclass(frozen=True)
class ForwardArguments:
    """What a model and its processor know of.

    Args:
        model: may be on meta.
        processor: its processor or tokenizer; None where there is none.
    """

    model: nn.Module
    processor: Any = None
    _passed: set[str] = field(default_factory=set, compare=False)

    def check(self, inputs: Mapping[str, Any], label: str) -> None:
        """Refuse tensors that nothing in the model takes.

        A name is known if the model's forward has it, or, where that takes any, if a forward inside of the model has
        it, the code of the model or of a module inside asks for it by that name, or the model's processor makes it.
        Where some of that code cannot be read (compiled, or made at run time) it cannot be known, and only a warning
        is given.

        Args:
            inputs: forward arguments of one sample that came prepared.
            label: names the sample in errors.

        Raises:
            SampleError: a tensor's name is not known; names it, and the nearest that is.
        """
        for name, value in inputs.items():
            if name in self._passed or not isinstance(value, Tensor):
                continue
            if name in self.named or (self.takes_any and (name in self._asked_for or name in self._produced)):
                self._passed.add(name)
                continue
            close = nearest(name, [*self.named, *self._produced])
            hint = "remove it." if close is None else f"did you mean {close!r}?"
            kind = type(self.model).__name__
            if self.takes_any and self._hidden:
                self._passed.add(name)
                warn(
                    f"calibration samples have {name!r}, and it cannot be seen whether {kind} does anything with that: "
                    f"{hint}"
                )
                continue
            raise SampleError(f"{label} has the forward argument {name!r}, which {kind} does not know; {hint}")

    @cached_property
    def takes_any(self) -> bool:
        """Whether the model's forward has ``**kwargs``."""
        return any(each.kind is inspect.Parameter.VAR_KEYWORD for each in _parameters(self.model))

    @cached_property
    def named(self) -> dict[str, None]:
        """Arguments by name: the forward's own, and where that takes any those of modules inside, the outer first."""
        inside = self.model.modules() if self.takes_any else ()
        kinds = {type(self.model): self.model}
        for module in inside:
            if not _is_torchs(type(module)):
                kinds.setdefault(type(module), module)
        return dict.fromkeys(name for module in kinds.values() for name in _names(module))

    @cached_property
    def _sources(self) -> dict[str, str | None]:
        """The code of the modules inside, by the file's module; None for what cannot be read. Torch's is left out."""
        found: dict[str, str | None] = {}
        for kind in dict.fromkeys(type(module) for module in self.model.modules()):
            name = kind.__module__
            if name not in found and not _is_torchs(kind):
                try:
                    found[name] = inspect.getsource(sys.modules[name])
                except (OSError, TypeError, KeyError):
                    found[name] = None
        return found

    @cached_property
    def _hidden(self) -> bool:
        return None in self._sources.values()

    @cached_property
    def _asked_for(self) -> set[str]:
        """Every string of that code, ``kwargs.get("name")`` among them."""
        trees = [ast.parse(each) for each in self._sources.values() if each]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}

    @cached_property
    def _produced(self) -> dict[str, None]:
        """What the processor makes of a text and of a picture, and what it says that it makes."""
        processor, made = self.processor, dict[str, None]()
        if processor is None:
            return made
        for part in (processor, *(getattr(processor, each, None) for each in _PARTS)):
            made |= dict.fromkeys(getattr(part, "model_input_names", None) or ())
        for probe in (unseen_texts()[0], *(unseen_chats()[:1] if takes_pictures(processor) else ())):
            try:
                made |= dict.fromkeys(encode_sample(probe, Encoding(processor, _PROBED), "an unseen sample"))
            except SABError:  # what it cannot prepare makes no names known
                continue
        return made


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.")


def _names(module: nn.Module) -> Iterator[str]:
    """Of a forward's arguments, those that its ``**kwargs: Unpack[...]`` lists among them."""
    for each in _parameters(module):
        if each.kind in _ANY:
            for listed in get_args(each.annotation):
                yield from getattr(listed, "__annotations__", ())
        else:
            yield each.name


def _parameters(module: nn.Module) -> Iterable[inspect.Parameter]:
    try:
        return inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # a forward in C has none
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
