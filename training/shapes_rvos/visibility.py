"""Which actors one clearly sees on the first frame, without rendering it."""

from __future__ import annotations

from functools import cache
from math import cos, hypot, pi, sin

import numpy as np
from numpy.typing import NDArray

from .outlines import OUTLINES, distance
from .scene import Scene

SHARE = 0.6
"""Least part of an actor that is in sight."""
PIXELS = 60
"""Least area in sight."""
STEP = 0.1
"""Distance of the points that an actor is probed at, in parts of its radius."""


@cache
def probes(shape: str) -> NDArray[np.float64]:
    """[2, N]: a grid of points inside the shape, in parts of its radius."""
    x, y = np.mgrid[-1:1:STEP, -1:1:STEP].reshape(2, -1) + STEP / 2
    inside = distance(np, x, y, OUTLINES[shape]) < 0
    return np.stack([x[inside], y[inside]])


def visible_on_first_frame(scene: Scene) -> tuple[int, ...]:
    """The actors of which enough is inside the frame and not covered."""
    return tuple(i for i in range(len(scene.actors)) if in_sight(scene, i))


def in_sight(scene: Scene, actor: int) -> bool:
    """Whether enough of the actor is inside the first frame and not covered by later actors or the occluder."""
    a, zoom, short = scene.actors[actor], scene.view(0)[2], min(scene.size)
    x, y = scene.centre(actor, 0)
    if not (-a.radius < x < 1 + a.radius and -a.radius < y < 1 + a.radius):
        return False
    height, width = scene.size
    points = probes(a.shape)
    right, down = turned(points, a.angle) * (a.radius * zoom * short) + np.array([[x * width], [y * height]])
    seen = (right > 0) & (right < width) & (down > 0) & (down < height)
    for bar in scene.occluders:
        across, length = (right, width) if bar.vertical else (down, height)
        seen &= abs(across - bar.centre * length) > bar.width * length / 2
    for i in range(actor + 1, len(scene.actors)):
        other, (other_x, other_y) = scene.actors[i], scene.centre(i, 0)
        apart = (x - other_x) * width, (y - other_y) * height
        if hypot(*apart) < (a.radius + other.radius) * zoom * short:
            beside = np.stack([right - other_x * width, down - other_y * height]) / (other.radius * zoom * short)
            own_x, own_y = turned(beside, -other.angle)
            seen &= distance(np, own_x, own_y, OUTLINES[other.shape]) > 0
    area = int(seen.sum())
    return area >= SHARE * points.shape[1] and area * (STEP * a.radius * zoom * short) ** 2 >= PIXELS


def turned(points: NDArray[np.float64], turn: float) -> NDArray[np.float64]:
    """[2, N] points, turned clockwise as one sees them."""
    c, s = cos(2 * pi * turn), sin(2 * pi * turn)
    return np.stack([c * points[0] - s * points[1], s * points[0] + c * points[1]])
