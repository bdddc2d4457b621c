"""Triton's interpreter without what it does in vain: the same numbers in a third of the time.

Its work is small arrays and much Python around them. Left out is what has no effect: looking for overflow, which is
reported only where `debug` is set, and looking for what is to be replaced in `triton.language` again at every call of
a function, when the launch has done that. What is the same for every value of a type is made once.
`tests/kernels/test_interpreter.py` compares it with the interpreter as it comes.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

VERSION = "3.7."  # whose inside this knows; others are left as they are


_before: list[tuple[Any, str, Any]] = []  # what was changed, as arguments of `setattr`


def restore() -> None:
    """Have Triton's own interpreter again."""
    while _before:
        setattr(*_before.pop())


def quicken() -> None:
    """Change the interpreter."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if _before or not triton.__version__.startswith(VERSION):
        return
    options = interpreter.interpreter_builder.options
    if options.debug:
        raise ValueError("the interpreter is to report overflow: it cannot be left out")
    patch = interpreter._patch_lang
    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    changes = [
        (interpreter.interpreter_builder, "options", dataclasses.replace(options, sanitize_overflow=False)),
        (interpreter, "_patch_lang", lambda _: patch(everywhere)),
        (interpreter.InterpretedFunction, "__call__", lambda self, *given, **named: self.rewrite()(*given, **named)),
        (interpreter, "_get_np_dtype", _numpy_dtypes(interpreter._get_np_dtype)),
        (tl.core.block_type, "__init__", _block_types(tl.core.block_type.__init__)),
        (tl.core.tensor, "__init__", _tensors(tl.core.tensor.__init__)),
    ]
    for owner, name, value in changes:
        _before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


def _numpy_dtypes(real):
    known: dict[str, Any] = {}

    def numpy_dtype(kind):
        scalar = kind.scalar
        if scalar.is_ptr():
            return real(kind)
        if scalar.name not in known:
            known[scalar.name] = real(scalar)
        return known[scalar.name]

    return numpy_dtype


def _block_types(real):
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def make(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if element_ty.is_ptr() or not all(type(size) is int for size in key[1:]):
            real(self, element_ty, shape)
            return
        if key not in known:
            real(self, element_ty, shape)
            known[key] = {**vars(self), "key": key}
        vars(self).update(known[key])

    return make


def _tensors(real):
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def make(self, handle, type):
        key = getattr(type, "key", None)  # given above
        if key is None:
            real(self, handle, type)
            return
        if key not in known:
            real(self, handle, type)
            known[key] = dict(vars(self))
        vars(self).update(known[key], handle=handle)

    return make
