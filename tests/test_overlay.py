from contextlib import suppress

import av
import numpy as np
import pytest
from PIL import Image
from sparrow_client._overlay import COLOURS, VideoWriter, blend, inside, write_picture, write_video


def painted(height, width, *spots):
    """[N, H, W] bool: one rectangle (rows, columns) per object."""
    masks = np.zeros((len(spots), height, width), bool)
    for mask, (rows, columns) in zip(masks, spots, strict=True):
        mask[rows, columns] = True
    return masks


def test_blend_colours_what_the_masks_cover_and_nothing_else():
    frame = np.full((20, 30, 3), 100, np.uint8)
    masks = painted(20, 30, (slice(0, 5), slice(0, 5)), (slice(10, 15), slice(10, 15)))
    drawn = blend(frame, masks)
    assert (drawn.shape, drawn.dtype) == (frame.shape, np.uint8)
    for mask, colour in zip(masks, COLOURS, strict=False):
        within = inside(mask, 1)
        np.testing.assert_array_equal(drawn[within], np.broadcast_to(np.uint8(50 + colour / 2), (within.sum(), 3)))
        np.testing.assert_array_equal(drawn[mask & ~within], np.full((25 - within.sum(), 3), 255))
    assert (drawn[~masks.any(0)] == 100).all()
    assert (frame == 100).all()  # the caller's frame is left alone


def test_blend_shows_both_colours_where_masks_overlap():
    masks = painted(12, 12, (slice(0, 6), slice(0, 12)), (slice(0, 12), slice(0, 6)))
    drawn = blend(np.zeros((12, 12, 3), np.uint8), masks)
    assert len({tuple(drawn[row, column]) for row in (1, 10) for column in (1, 10)}) == 4  # both, first, second, none


def test_outline_lies_within_the_mask_and_not_along_the_frames_edge():
    (mask,) = painted(10, 10, (slice(0, 6), slice(2, 8)))
    (deep,) = painted(10, 10, (slice(0, 4), slice(4, 6)))
    np.testing.assert_array_equal(inside(mask, 2), deep)


def test_blend_without_masks_is_the_frame():
    frame = np.random.default_rng(0).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(blend(frame, np.zeros((0, 6, 7), bool)), frame)


def test_colours_differ_and_are_used_again_when_there_are_more_objects():
    assert len(np.unique(COLOURS, axis=0)) == len(COLOURS)
    masks = painted(9, 9 * (len(COLOURS) + 1), *((slice(None), slice(9 * i, 9 * i + 9)) for i in range(len(COLOURS) + 1)))
    drawn = blend(np.zeros((*masks.shape[1:], 3), np.uint8), masks)[4, 4::9]
    assert len(np.unique(drawn, axis=0)) == len(COLOURS)
    np.testing.assert_array_equal(drawn[0], drawn[-1])


def test_picture_is_written(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    write_picture(tmp_path / "picture.png", frame)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "picture.png")), frame)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (75, 133), (33, 64), (48, 1), (1, 1)])
def test_video_of_any_size_is_readable_and_keeps_the_picture(tmp_path, height, width):
    masks = painted(height, width, (slice(0, max(1, height // 2)), slice(None)))
    frames = [blend(np.full((height, width, 3), level, np.uint8), masks) for level in (20, 90, 160)]
    write_video(tmp_path / "overlay.mp4", frames, fps=2.5)
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", 2.5)
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(read) == len(frames)
    for got, frame in zip(read, frames, strict=True):
        assert got.shape == (height + height % 2, width + width % 2, 3)
        # Colour is stored at half the resolution and as limited YUV: flat areas come back within a few levels.
        rows = [height // 4, height - 1 - height // 4] if height > 4 else [0]
        assert abs(got[rows, width // 2].astype(int) - frame[rows, width // 2]).max() <= 12


@pytest.mark.parametrize("fps", [1, 0.04, 1000 / 1001, 59.94])
def test_video_keeps_its_rate(tmp_path, fps):
    write_video(tmp_path / "overlay.mp4", [np.zeros((16, 16, 3), np.uint8)] * 3, fps)
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-3)


def test_video_can_be_played_while_it_is_written(tmp_path):
    noise = np.random.default_rng(0)
    with VideoWriter(tmp_path / "overlay.mp4", 25) as video:
        for _ in range(600):
            video.add(noise.integers(0, 256, (32, 32, 3), np.uint8))
        played = 0
        with av.open(str(tmp_path / "overlay.mp4")) as container, suppress(av.FFmpegError):  # its last fragment is half written
            for _ in container.decode(video=0):
                played += 1
        assert played > 100
