"""The outlines of the shapes, written once for NumPy and for torch."""

from __future__ import annotations

from math import cos, pi, sin
from typing import Any

ROUND = 1000
"""Corners enough for a circle."""
ARM = 0.34
"""Half the width of a cross's arms."""
STAR = (0.45 * cos(pi / 5), 0.45 * sin(pi / 5))
"""An inner corner of the star."""

# A shape in a circle of radius 1 is `n` copies of a wedge, each a mirror image in its own axis. Folded on top of one another, axis
# along x, all of them end at one or two lines a x + b y = c: the shape is where a x + b y < c.
OUTLINES: dict[str, tuple[float, ...]] = {
    # n, (a, b, c) twice
    "circle": (ROUND, 1, 0, 1, 1, 0, 1),
    "square": (4, 1, 0, cos(pi / 4), 1, 0, cos(pi / 4)),
    "triangle": (3, 1, 0, cos(pi / 3), 1, 0, cos(pi / 3)),
    "star": (5, *((STAR[1], 1 - STAR[0], STAR[1]) * 2)),
    "cross": (4, 1, 0, (1 - ARM**2) ** 0.5, 0, 1, ARM),
    "ring": (ROUND, 1, 0, 1, -1, 0, -0.55),
}
OUTLINES["star"] = (5, *(part / (STAR[1] ** 2 + (1 - STAR[0]) ** 2) ** 0.5 for part in OUTLINES["star"][1:]))


def distance(library: Any, x: Any, y: Any, outline: Any) -> Any:
    """How far points are outside a shape, negative inside; exact near its edges.

    Args:
        library: numpy or torch.
        x, y: arrays in the shape's own frame, in parts of its radius.
        outline: the 7 numbers of OUTLINES, each broadcast against x and y.
    """
    n, a, b, c, a2, b2, c2 = outline
    radius, turn = library.hypot(x, y), library.arctan2(y, x) * (n / (2 * pi))
    turn = (turn - library.round(turn)) * (2 * pi / n)
    x, y = radius * library.cos(turn), radius * abs(library.sin(turn))
    return library.maximum(a * x + b * y - c, a2 * x + b2 * y - c2)
