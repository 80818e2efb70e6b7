"""The curve of Ed25519 in plain numbers: -x^2 + y^2 = 1 + d x^2 y^2 over the field of P elements (RFC 8032, 5.1)."""

from __future__ import annotations

Point = tuple[int, int]

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P
ORDER = 2**252 + 27742317777372353535851937790883648493
"""Of the base point."""

BASE_Y = 4 * pow(5, -1, P) % P


def xs(y: int) -> set[int]:
    """The x of all points with this y."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    root = pow(square, (P + 3) // 8, P)
    if root * root % P != square:
        root = root * pow(2, (P - 1) // 4, P) % P
    return {root, -root % P} if root * root % P == square else set()


def add(a: Point, b: Point) -> Point:
    """The sum of two points."""
    (x1, y1), (x2, y2) = a, b
    k = D * x1 * x2 * y1 * y2
    return (
        (x1 * y2 + x2 * y1) * pow(1 + k, -1, P) % P,
        (y1 * y2 + x1 * x2) * pow(1 - k, -1, P) % P,
    )


def times(n: int, point: Point) -> Point:
    """The sum of ``n`` of them."""
    result = (0, 1)
    while n:
        if n & 1:
            result = add(result, point)
        point = add(point, point)
        n >>= 1
    return result


def base() -> Point:
    """The base point: the one of the two whose x is even."""
    return next(x for x in xs(BASE_Y) if x % 2 == 0), BASE_Y


def encoded(point: Point) -> bytes:
    """The 32 bytes of a point."""
    x, y = point
    return (y | (x & 1) << 255).to_bytes(32, "little")
