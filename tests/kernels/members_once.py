"""Has Triton's interpreter look once for the functions of its language that it replaces.

It goes through all members of four modules at every call of a function within a kernel, a quarter of the
time that interpreted kernels take. Loaded where kernels are interpreted (`pytest -p members_once`).
"""

from __future__ import annotations

import functools
import inspect

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def builtins(package: object) -> list[tuple[str, object]]:
    """The members to replace, as they are before any is."""
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtin(package: object, builder: object, scope: object) -> None:
    """As the interpreter's own: a member that was replaced already stays what it is."""
    for name, member in builtins(package):
        if getattr(package, name) is member:
            interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_builtin = patch_builtin
