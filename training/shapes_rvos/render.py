"""Scenes to frames and masks, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, pi

import torch
from torch import Tensor

from .outlines import OUTLINES, distance
from .scene import MAX_ACTORS, RADII, Actor, Occluder, Scene

PATTERN_FORMS = {"plain": (0.0, -9.0), "striped": (0.0, 0.22), "dotted": (1.0, 0.32)}
"""Whether a pattern repeats along y too, and half the width of what repeats in parts of a period."""
NOWHERE = Actor(
    "circle", "red", "plain", "small", "still", 0.1, (-9, -9), (0, 0), (0, 0), 0, (0, 0), 0, 0, (0, 0, 0), (0, 0, 0), 1
)  # fmt: skip
"""Fills up the actors of a scene: far outside the frame."""
NO_OCCLUDER = Occluder(True, -9, 0, 0)
WINDOW = 2.1 * RADII["large"][1]
"""Side of a square that holds any actor at any zoom, in parts of the short side."""


def pack(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The numbers of S scenes as tensors [S, ...], actors and occluders filled up; a scene's entries can be picked by index."""
    actors = [(*scene.actors, *[NOWHERE] * (MAX_ACTORS - len(scene.actors))) for scene in scenes]
    bars = [(*scene.occluders, NO_OCCLUDER)[0] for scene in scenes]

    def each(name: str) -> Tensor:
        return torch.tensor([[getattr(actor, name) for actor in row] for row in actors], dtype=torch.float32)

    names = ("radius", "start", "velocity", "swing", "frequency", "phase", "angle", "spin", "rgb", "pattern_rgb", "pattern_scale")
    return {name: each(name) for name in names} | {
        "outline": torch.tensor([[OUTLINES[actor.shape] for actor in row] for row in actors], dtype=torch.float32),
        "pattern": torch.tensor([[PATTERN_FORMS[actor.pattern] for actor in row] for row in actors], dtype=torch.float32),
        "occluder": torch.tensor([(bar.vertical, bar.centre, bar.width, bar.grey) for bar in bars], dtype=torch.float32),
        "background": torch.tensor([scene.background.rgb for scene in scenes], dtype=torch.float32),
        "waves": torch.tensor([scene.background.waves for scene in scenes], dtype=torch.float32),
        "noise": torch.tensor([scene.background.noise for scene in scenes], dtype=torch.float32),
        "seed": torch.tensor([scene.background.seed for scene in scenes], dtype=torch.int32),
        "camera": torch.tensor([(*s.camera.amplitude, s.camera.frequency, s.camera.phase) for s in scenes], dtype=torch.float32),
    }


def render(packed: dict[str, Tensor], times: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Frames and masks.

    Args:
        packed: of S scenes, on the device that shall render.
        times: [S, T] float32, 0..1.
        size: height and width.
    Returns:
        frames: [S, T, 3, H, W] float32, 0..255, not rounded.
        masks: [S, T, MAX_ACTORS, H, W] bool: where the actor is what one sees; all False for those that a scene has not.
    """
    amplitude, frequency, phase = packed["camera"][:, None, :3], packed["camera"][:, 3:4], packed["camera"][:, 4:5]
    view = amplitude * torch.sin(2 * pi * (frequency * times + phase))[..., None]  # [S, T, 3]: offset x and y, zoom
    view[..., 2] += 1
    frames = draw_background(packed, view, size)
    masks = torch.zeros((*times.shape, MAX_ACTORS, *size), dtype=torch.bool, device=times.device)
    for actor in range(MAX_ACTORS):
        draw_actor(packed, actor, times, view, frames, masks)
    draw_occluder(packed["occluder"], frames, masks)
    frames += grain(packed, times, size)[:, :, None]
    return frames.clamp_(0, 255), masks


def draw_background(packed: dict[str, Tensor], view: Tensor, size: tuple[int, int]) -> Tensor:
    """[S, T, 3, H, W]: the two colours, mixed by the waves."""
    height, width = size
    x, y = (
        ((torch.arange(length, device=view.device) + 0.5) / length - 0.5 - view[..., axis, None]) / view[..., 2, None] + 0.5
        for axis, length in enumerate((width, height))
    )  # [S, T, W], [S, T, H]: what part of the world is seen
    wave_x, wave_y, phase, weight = packed["waves"][:, None, :, :, None].unbind(3)  # [S, 1, 4, 1]
    x, y = 2 * pi * wave_x * x[:, :, None], 2 * pi * (wave_y * y[:, :, None] + phase)
    rows = torch.cat([weight * y.cos(), -weight * y.sin()], 2)  # cos(x + y) = cos y cos x - sin y sin x
    mix = rows.transpose(2, 3) @ torch.cat([x.cos(), x.sin()], 2)  # [S, T, H, W], -1..1
    first, second = packed["background"][:, None, :, :, None, None].unbind(2)  # [S, 1, 3, 1, 1]
    return torch.addcmul((first + second) / 2, (second - first) / 2, mix[:, :, None])


def draw_actor(packed: dict[str, Tensor], actor: int, times: Tensor, view: Tensor, frames: Tensor, masks: Tensor) -> None:
    """Paint an actor over the frames, and take what it covers from the masks of those behind it.

    Only a window around it is touched, which lies inside the frame even where the actor does not.
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    own = {name: packed[name][:, None, actor] for name in ("radius", "start", "velocity", "swing", "rgb", "pattern_rgb", "pattern_scale")}
    frequency, phase = packed["frequency"][:, actor, None, None], packed["phase"][:, None, actor]
    swung = torch.sin(2 * pi * (frequency * times[..., None] + phase)) - torch.sin(2 * pi * phase)
    centre = own["start"] + own["velocity"] * times[..., None] + own["swing"] * swung  # [S, T, 2]
    centre = 0.5 + (centre - 0.5) * view[..., 2:] + view[..., :2]
    radius = (own["radius"] * view[..., 2] * short)[..., None, None]  # [S, T, 1, 1] pixels

    side = min(short, ceil(WINDOW * short) + 2)
    columns, rows = (  # [S, T, side]
        (centre[..., axis] * length - side / 2).round().clamp(0, length - side).long()[..., None] + torch.arange(side, device=times.device)
        for axis, length in enumerate((width, height))
    )
    right = (columns + 0.5 - centre[..., :1] * width)[..., None, :] / radius
    down = (rows + 0.5 - centre[..., 1:] * height)[..., None] / radius
    angle = 2 * pi * (packed["angle"][:, actor, None] + packed["spin"][:, actor, None] * times)[..., None, None]
    x = right * angle.cos() + down * angle.sin()  # [S, T, side, side], in the actor's own frame
    y = down * angle.cos() - right * angle.sin()
    outline = packed["outline"][:, actor, :, None, None, None].unbind(1)
    alpha = (0.5 - radius * distance(torch, x, y, outline)).clamp_(0, 1)

    scale = own["pattern_scale"][..., None, None]
    along_y, half = packed["pattern"][:, actor, :, None, None, None].unbind(1)
    x, y = (along * scale - (along * scale).round() for along in (x, y))
    pattern = (0.5 + (half - torch.hypot(x, y * along_y)) * (radius / scale)).clamp_(0, 1)
    rgb, pattern_rgb = (own[name][..., None, None] for name in ("rgb", "pattern_rgb"))
    colour = torch.addcmul(rgb, pattern_rgb - rgb, pattern[:, :, None])  # [S, T, 3, side, side]

    where = (rows[..., None] * width + columns[..., None, :]).flatten(2)[:, :, None]  # [S, T, 1, side * side]
    frames, masks = frames.flatten(3), masks.flatten(3)  # views
    where3 = where.expand(-1, -1, 3, -1)
    frames.scatter_(3, where3, frames.gather(3, where3).lerp_(colour.flatten(3), alpha.flatten(2)[:, :, None]))
    inside = alpha.flatten(2)[:, :, None] > 0.5
    where_behind = where.expand(-1, -1, actor, -1)
    masks[:, :, :actor].scatter_(3, where_behind, masks[:, :, :actor].gather(3, where_behind) & ~inside)
    masks[:, :, actor : actor + 1].scatter_(3, where, inside)


def draw_occluder(occluder: Tensor, frames: Tensor, masks: Tensor) -> None:
    """Paint the bars over everything."""
    height, width = frames.shape[-2:]
    vertical, centre, part, grey = occluder[:, :, None, None, None, None].unbind(1)  # [S, 1, 1, 1, 1]
    x, y = (torch.arange(length, device=frames.device) + 0.5 for length in (width, height))
    across, length = torch.where(vertical > 0, x, y[:, None]), torch.where(vertical > 0, width, height)  # [S, 1, 1, H, W]
    alpha = (0.5 + part * length / 2 - (across - centre * length).abs()).clamp_(0, 1)
    frames.lerp_(grey, alpha)
    masks &= alpha <= 0.5


def grain(packed: dict[str, Tensor], times: Tensor, size: tuple[int, int]) -> Tensor:
    """[S, T, H, W]: noise of a hash of pixel, time and seed, the same on every device."""
    height, width = size
    pixel = torch.arange(height * width, dtype=torch.int32, device=times.device).view(size)
    moment = packed["seed"][:, None] + (times * 10000).round().int() * 7919
    bits = moment[..., None, None] * 0x2C1B3C6D + pixel * 0x297A2D39  # wraps around
    for _ in range(2):
        bits ^= bits >> 16
        bits *= 0x45D9F3B
    bits ^= bits >> 16
    noise = (bits & 0xFFFF) + ((bits >> 16) & 0xFFFF)
    return (noise / 0xFFFF - 1) * packed["noise"][:, None, None, None]
