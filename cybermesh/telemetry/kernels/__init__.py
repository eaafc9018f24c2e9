"""Compiled loops of the meter: records, headers, flow table, update, features.

Each kernel does for one packet or flow after the other what the numpy reference does column by column, with the same integers
and, at emission, the same floating-point operations in the same order, so that the two agree bit for bit. What is rare goes
back to the reference through index lists. Kernels are pure: they read and write the arrays they are given.

Importing a kernel module compiles it or loads it from numba's cache; say where that is (``compile_cache``) before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import llvmlite.ir  # type: ignore[import-untyped]
import numba
from numba.core import types
from numba.extending import intrinsic

Result = TypeVar("Result")

# Kernels make no arrays, so counting references to those they are given (``_nrt``) would only cost time: most of it, in fact.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


def kernel(signature: Any) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Compile a function for one signature, without the interpreter's lock; keep the result if numba was told where."""

    def compile_now(function: Callable[..., Result]) -> Callable[..., Result]:
        try:
            settings: Any = numba.config
            kept = bool(settings.CACHE_DIR)
            compiled: Callable[..., Result] = numba.njit(signature, cache=kept, **_OPTIONS)(function)
        except (RuntimeError, OSError):  # the folder cannot be written any more, or is full: compile for this process only
            compiled = numba.njit(signature, **_OPTIONS)(function)
        return compiled

    return compile_now


def part(function: Callable[..., Result]) -> Callable[..., Result]:
    """Mark a piece of kernels: compiled into each kernel that calls it, never called from Python."""
    compiled: Callable[..., Result] = numba.njit(forceinline=True, **_OPTIONS)(function)
    return compiled


def record(fields: type[tuple[Any, ...]], *kinds: Any) -> Any:
    """Return numba's type of a named tuple, for signatures."""
    uniform: Any = types.NamedUniTuple
    mixed: Any = types.NamedTuple
    return uniform(kinds[0], len(kinds), fields) if len(set(kinds)) == 1 else mixed(kinds, fields)


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Return the address of ``array[row]`` as a pointer to bytes; no check, no counting from the end."""
    view = context.make_array(signature.args[0])(context, builder, arguments[0])
    row = context.cast(builder, arguments[1], signature.args[1], types.intp)
    offset = builder.mul(row, builder.extract_value(view.strides, 0))
    return builder.gep(builder.bitcast(view.data, llvmlite.ir.IntType(8).as_pointer()), [offset])


def _loader(bits: int, result: Any) -> Callable[..., Any]:
    """Make a function of kernels that reads a number of so many bits, wherever it lies."""

    def load(_typing: Any, data: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            where = _pointer(context, builder, signature, arguments)
            value = builder.load(builder.bitcast(where, llvmlite.ir.IntType(bits).as_pointer()), align=1)
            return value if bits == result.bitwidth else builder.zext(value, llvmlite.ir.IntType(result.bitwidth))

        return result(data, at), generate

    function: Callable[..., Any] = intrinsic(load)
    return function


# The bytes from ``data[at]`` on as a number in the machine's byte order; the caller has checked that they are there.
load_8, load_16, load_32 = (_loader(bits, types.int64) for bits in (8, 16, 32))
load_64 = _loader(64, types.uint64)


def _prefetch(_typing: Any, array: Any, row: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _pointer(context, builder, signature, arguments)
        byte, whole = where.type, llvmlite.ir.IntType(32)
        kind = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), [byte, whole, whole, whole])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        builder.call(function, [where, whole(1), whole(3), whole(1)])  # for writing, keep close, data
        return context.get_dummy_value()

    return types.void(array, row), generate


# prefetch(array, row) asks for the cache line where ``array[row]`` begins, without waiting for it.
prefetch: Callable[..., None] = intrinsic(_prefetch)
