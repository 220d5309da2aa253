"""Integer, logic and bit instructions. Source: PTX ISA, sections "Integer Arithmetic", "Logic and Shift"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.ptx.operation import Operation
from tests.ptx.types import Array, Bools, bits, dtype

__all__ = ["operations"]

_WIDTHS = (16, 32, 64)
_INTEGERS = tuple(f"{kind}{width}" for width in _WIDTHS for kind in "us")


def _shift_left(a: Array, n: Array) -> Array:
    width = a.dtype.itemsize * 8
    return np.where(n >= width, a.dtype.type(0), a << (n & (width - 1)).astype(a.dtype))


def _shift_right(a: Array, n: Array) -> Array:
    width = a.dtype.itemsize * 8
    if a.dtype.kind == "i":
        return a >> np.minimum(n, width - 1).astype(a.dtype)
    return np.where(n >= width, a.dtype.type(0), a >> (n & (width - 1)).astype(a.dtype))


def _ones(n: Array) -> Array:
    """uint64 with the n lowest bits set; n up to 255."""
    one = np.uint64(1)
    return _shift_left(np.broadcast_to(one, np.shape(n)).astype(np.uint64), n) - one


def _magnitude(a: Array) -> Array:
    unsigned = a.astype(f"u{a.dtype.itemsize}")
    return np.where(a < 0, -unsigned, unsigned) if a.dtype.kind == "i" else unsigned


def _divide(a: Array, b: Array) -> Array:
    """Towards zero; the smallest integer by -1 wraps."""
    with np.errstate(all="ignore"):
        quotient = _magnitude(a) // np.maximum(_magnitude(b), 1)
    return np.where((a < 0) ^ (b < 0), -quotient, quotient).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return (a - _divide(a, b) * b).astype(a.dtype)


def _high(a: Array, b: Array) -> Array:
    width = a.dtype.itemsize * 8
    if width < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (np.multiply(a, b, dtype=wide) >> wide(width)).astype(a.dtype)
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    x0, x1, y0, y1 = x & mask, x >> half, y & mask, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    low = (middle & mask) + x0 * y1
    high = x1 * y1 + (middle >> half) + (low >> half)
    if a.dtype.kind == "i":
        zero = np.uint64(0)
        high = high - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
    return high.astype(a.dtype)


def _bit_field_extract(a: Array, b: Array, c: Array) -> Array:
    width = a.dtype.itemsize * 8
    position, length = (np.asarray(x & 255, np.int64) for x in (b, c))
    top = np.minimum(position + length - 1, width - 1)
    if a.dtype.kind == "u":
        return (_shift_right(a.astype(np.uint64), position) & _ones(length)).astype(a.dtype)
    up = np.maximum(63 - top, 0)
    field = a.astype(np.int64) << up >> up >> np.minimum(position, 63)
    return np.where(length == 0, 0, field).astype(a.dtype)


def _bit_field_insert(a: Array, b: Array, c: Array, d: Array) -> Array:
    position, length = c & 255, d & 255
    mask = _shift_left(_ones(length), position)
    inserted = _shift_left(np.asarray(a, np.uint64), position)
    return ((inserted & mask) | (np.asarray(b, np.uint64) & ~mask)).astype(dtype(f"u{8 * b.dtype.itemsize}"))


def _lop3(a: Array, b: Array, c: Array, table: Any) -> Array:
    result = np.zeros(np.broadcast(a, b, c).shape, a.dtype)
    for row in range(8):
        if int(table) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _select_bytes(both: Array, selectors: list[Array]) -> Array:
    """Four bytes of a 64-bit value; a selector's bit 3 replicates the byte's sign."""
    result = np.zeros(np.broadcast(both, *selectors).shape, np.uint32)
    for place, selector in enumerate(selectors):
        byte = (both >> ((selector & 7).astype(np.uint64) * np.uint64(8))).astype(np.uint8)
        sign = (byte.view(np.int8) >> 7).view(np.uint8)
        result |= np.where(selector & 8, sign, byte).astype(np.uint32) << np.uint32(8 * place)
    return result


def _permute(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    return _select_bytes(both, [np.asarray(selector >> np.uint32(4 * i)) & 15 for i in range(4)])


_PERMUTE_MODES: dict[str, Callable[[int, Array], Array]] = {
    "f4e": lambda i, s: (s + i) & 7,
    "b4e": lambda i, s: (s - i) & 7,
    "rc8": lambda _, s: s,
    "ecl": lambda i, s: np.maximum(s, i),
    "ecr": lambda i, s: np.minimum(s, i),
    "rc16": lambda i, s: (s & 1) * 2 + (i & 1),
}


def _permute_mode(mode: str) -> Callable[..., Array]:
    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        low = np.asarray(selector & 3, np.int64)
        return _select_bytes(both, [np.asarray(_PERMUTE_MODES[mode](i, low)) for i in range(4)])

    return permute


def _funnel(left: bool, clamp: bool) -> Callable[..., Array]:
    def shift(a: Array, b: Array, c: Array) -> Array:
        """``a`` is the low, ``b`` the high half."""
        n = np.minimum(c, 32) if clamp else c & 31
        both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        moved = both << n.astype(np.uint64) >> np.uint64(32) if left else both >> n.astype(np.uint64)
        return moved.astype(np.uint32)

    return shift


def _top_bit(a: Array) -> Array:
    """Position of the highest set bit, -1 of zero."""
    position, rest = np.full(a.shape, -1, np.int64), a.astype(np.uint64)
    for step in (32, 16, 8, 4, 2, 1):
        more = rest >> np.uint64(step) != 0
        position += np.where(more, step, 0)
        rest = np.where(more, rest >> np.uint64(step), rest)
    return position + (rest != 0)


def _reverse(a: Array) -> Array:
    width = a.dtype.itemsize * 8
    parts = np.unpackbits(np.ascontiguousarray(a).view(np.uint8), bitorder="little").reshape(*a.shape, width)
    return np.packbits(parts[..., ::-1], axis=-1, bitorder="little").view(a.dtype).reshape(a.shape)


def _find(a: Array) -> Array:
    """bfind: the highest bit that differs from the sign; all ones where there is none."""
    return _top_bit(_magnitude_bits(a)).astype(np.uint32)


def _magnitude_bits(a: Array) -> Array:
    return (np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a).astype(f"u{a.dtype.itemsize}")


def _dot4(a: Array, b: Array, c: Array, left: str, right: str) -> Array:
    x, y = (
        np.ascontiguousarray(v).view(f"{k}1").reshape(-1, 4).astype(np.int64)
        for v, k in ((a, left), (b, right))
    )
    return ((x * y).sum(1) + c).astype(np.uint32)


def _zero(_: Array, b: Array) -> Bools:
    return np.asarray(b == 0)


COMPARISONS: dict[str, Any] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _arithmetic() -> Iterator[tuple[str, Operation]]:
    for t in _INTEGERS:
        two, same = (t, t), f"u{bits(t)}"
        for name, ufunc in (("add", np.add), ("sub", np.subtract), ("mul.lo", np.multiply)):
            yield f"{name}.{t}", Operation(result=same, sources=(same, same), function=ufunc)
        for name, ufunc in (("min", np.minimum), ("max", np.maximum)):
            yield f"{name}.{t}", Operation(result=t, sources=two, function=ufunc)
        yield f"mul.hi.{t}", Operation(result=t, sources=two, function=_high)
        yield f"mad.lo.{t}", Operation(result=same, sources=(same,) * 3, function=lambda a, b, c: a * b + c)
        yield f"mad.hi.{t}", Operation(result=t, sources=(t,) * 3, function=lambda a, b, c: _high(a, b) + c)
        yield f"div.{t}", Operation(result=t, sources=two, function=_divide, undefined=_zero)
        yield f"rem.{t}", Operation(result=t, sources=two, function=_remainder, undefined=_zero)
        if t[0] == "s":
            yield f"abs.{t}", Operation(result=t, sources=(t,), function=np.absolute)
            yield f"neg.{t}", Operation(result=t, sources=(t,), function=np.negative)
        if bits(t) < 64:
            wide = f"{t[0]}{2 * bits(t)}"
            yield f"mul.wide.{t}", Operation(result=wide, sources=two, function=_wide(wide))
            yield f"mad.wide.{t}", Operation(result=wide, sources=(*two, wide), function=_wide(wide))
    for left in "us":
        for right in "us":
            kinds = {"u": "u", "s": "i"}
            yield (
                f"dp4a.{left}32.{right}32",
                Operation(
                    result="b32",
                    sources=("b32", "b32", "b32"),
                    function=lambda a, b, c, x=kinds[left], y=kinds[right]: _dot4(
                        *np.broadcast_arrays(a, b), c, x, y
                    ),
                ),
            )


def _wide(name: str) -> Callable[..., Array]:
    kind = dtype(name)

    def multiply(a: Array, b: Array, *c: Array) -> Array:
        product = np.multiply(a, b, dtype=kind)
        return product + c[0] if c else product

    return multiply


def _logic() -> Iterator[tuple[str, Operation]]:
    for t in ("pred", "b16", "b32", "b64"):
        for name, ufunc in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            yield f"{name}.{t}", Operation(result=t, sources=(t, t), function=ufunc)
        yield f"not.{t}", Operation(result=t, sources=(t,), function=np.invert)
    for width in _WIDTHS:
        yield (
            f"cnot.b{width}",
            Operation(result=f"b{width}", sources=(f"b{width}",), function=lambda a: a == 0),
        )
        yield (
            f"shl.b{width}",
            Operation(result=f"b{width}", sources=(f"b{width}", "b32"), function=_shift_left),
        )
        for kind in "bus":
            t = f"{kind}{width}"
            yield f"shr.{t}", Operation(result=t, sources=(t, "b32"), function=_shift_right)
    yield "lop3.b32", Operation(result="b32", sources=("b32",) * 4, function=_lop3)
    yield "prmt.b32", Operation(result="b32", sources=("b32",) * 3, function=_permute)
    for mode in _PERMUTE_MODES:
        yield f"prmt.b32.{mode}", Operation(result="b32", sources=("b32",) * 3, function=_permute_mode(mode))
    for side in "lr":
        for limit in ("wrap", "clamp"):
            function = _funnel(side == "l", limit == "clamp")
            yield f"shf.{side}.{limit}.b32", Operation(result="b32", sources=("b32",) * 3, function=function)


def _bits() -> Iterator[tuple[str, Operation]]:
    for width in (32, 64):
        t = f"b{width}"
        yield f"popc.{t}", Operation(result="b32", sources=(t,), function=np.bitwise_count)
        yield f"brev.{t}", Operation(result=t, sources=(t,), function=_reverse)
        yield f"bfi.{t}", Operation(result=t, sources=(t, t, "b32", "b32"), function=_bit_field_insert)
        yield (
            f"clz.{t}",
            Operation(
                result="b32",
                sources=(t,),
                function=lambda a, w=width: (w - 1 - _top_bit(a)).astype(np.uint32),
            ),
        )
        for kind in "us":
            t = f"{kind}{width}"
            yield f"bfe.{t}", Operation(result=t, sources=(t, "b32", "b32"), function=_bit_field_extract)
            yield f"bfind.{t}", Operation(result="b32", sources=(t,), function=_find)


def _comparisons() -> Iterator[tuple[str, str, Any]]:
    for width in _WIDTHS:
        for kind in "bus":
            for name, ufunc in COMPARISONS.items():
                if kind != "b" or name in ("eq", "ne"):
                    yield name, f"{kind}{width}", ufunc
        for name, ufunc in (
            ("lo", np.less),
            ("ls", np.less_equal),
            ("hi", np.greater),
            ("hs", np.greater_equal),
        ):
            yield name, f"u{width}", ufunc


def set_predicates(comparisons: Iterator[tuple[str, str, Any]]) -> Iterator[tuple[str, Operation]]:
    """setp with and without a third predicate; the second destination has the comparison negated."""
    for name, t, compare in comparisons:
        yield (
            f"setp.{name}.{t}",
            Operation(
                result="pred", sources=(t, t), function=compare, second=lambda a, b, f=compare: ~f(a, b)
            ),
        )
        for word, combine in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
            yield (
                f"setp.{name}.{word}.{t}",
                Operation(
                    result="pred",
                    sources=(t, t, "pred"),
                    function=lambda a, b, c, f=compare, g=combine: g(f(a, b), c),
                    second=lambda a, b, c, f=compare, g=combine: g(~f(a, b), c),
                ),
            )


def _choices() -> Iterator[tuple[str, Operation]]:
    for width in _WIDTHS:
        for kind in "busf":
            t = f"b{width}"
            yield (
                f"selp.{kind}{width}",
                Operation(result=t, sources=(t, t, "pred"), function=lambda a, b, p: np.where(p, a, b)),
            )


def operations() -> Iterator[tuple[str, Operation]]:
    """Spelling and meaning of every instruction here."""
    yield from _arithmetic()
    yield from _logic()
    yield from _bits()
    yield from set_predicates(_comparisons())
    yield from _choices()
