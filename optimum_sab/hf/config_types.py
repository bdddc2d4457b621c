"""Types of the settings that no range check looks at: a config.json may hold anything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from optimum_sab.errors import ConfigError


def _text(value: object) -> bool:
    return isinstance(value, str)


def _whole_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _texts(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping)) and all(map(_text, value))


def _rules(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _text(rule) and isinstance(changes, Mapping) and all(map(_text, changes)) for rule, changes in value.items()
    )


def _data(value: object) -> bool:
    return not isinstance(value, (bool, int, float, complex))


def _optional(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or kind(value)


def _mapping(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_text, value))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _named_texts(value: object) -> bool:
    return _mapping(value) and isinstance(value, Mapping) and all(map(_text, value.values()))


def _counts(value: object) -> bool:
    return _mapping(value) and isinstance(value, Mapping) and all(map(_whole_number, value.values()))


def _sample_counts(value: object) -> bool:
    return _counts(value) and isinstance(value, Mapping) and {"samples", "with_pictures"} <= set(value)


def _figures(*values: object) -> bool:
    """Numbers, or None where what was measured was none."""
    return all(map(_optional(_number), values))


def _agreement(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _text(kind) and isinstance(each, Mapping) and {"kl", "top1"} <= set(each) and _figures(each["kl"], each["top1"])
        for kind, each in value.items()
    )


def _verdict(value: object) -> bool:
    return _named_texts(value) and isinstance(value, Mapping) and {"level", "words"} <= set(value)


def _block_errors(value: object) -> bool:
    return isinstance(value, Sequence) and all(
        isinstance(each, Sequence) and len(each) == 2 and _figures(each[0], each[1]) for each in value
    )


_SETTINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    "format_version": (_whole_number, "a whole number"),
    "modules_to_not_convert": (_optional(_texts), "a list of module rules"),
    "dynamic": (_optional(_rules), "a mapping of rules to mappings of layer settings"),
    "calibration": (_data, "texts, chats, the name of a set, or a path"),
    "evaluation": (_data, "texts, chats, the name of a set, or a path"),
    "calibration_pass": (_text, "the name of a registered pass"),
    "calibration_device": (_optional(_text), "the name of a device, such as 'cuda'"),
    "measured": (_optional(_mapping), "the mapping that the quantizer wrote"),
}
_MEASURED: dict[str, tuple[Callable[[object], bool], str]] = {
    "left_dense": (_texts, "a list of module names"),
    "experts": (_texts, "a list of module names"),
    "dynamic_order": (_texts, "a list of rules"),
    "weights": (_text, "the name of a save"),
    "base": (_named_texts, "a mapping of texts: model, revision, license"),
    "bits_per_weight": (_number, "a number"),
    "calibration_samples": (_sample_counts, "a mapping with the whole numbers samples and with_pictures"),
    "calibration_tokens": (_counts, "a mapping of modalities to whole numbers"),
    "agreement": (_agreement, "a mapping of kinds to mappings with the numbers kl and top1"),
    "verdict": (_verdict, "a mapping with the texts level and words"),
    "block_errors": (_block_errors, "a list with two numbers for each block, which may be null"),
}


def check_types(settings: Mapping[str, Any]) -> None:
    """Refuse a setting whose type nothing can be made of.

    Args:
        settings: by name; others than those above are passed over.

    Raises:
        ConfigError: names the setting, its value and what it has to be.
    """
    _check(settings, _SETTINGS, "")
    _check(settings.get("measured") or {}, _MEASURED, "measured.")


def _check(values: Mapping[str, Any], table: Mapping[str, tuple[Callable[[object], bool], str]], start: str) -> None:
    for name, (good, wanted) in table.items():
        if name in values and not good(values[name]):
            shown = repr(values[name])
            raise ConfigError(f"{start}{name}={shown if len(shown) <= 80 else shown[:77] + '...'} must be {wanted}.")
