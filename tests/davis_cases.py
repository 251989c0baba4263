"""Videos that are small and hard to score, drawn anew from seeds; NumPy alone, as the official toolkit scores them elsewhere.

tests/data/davis_toolkit.json holds what the toolkit (github.com/davisvideochallenge/davis2017-evaluation, commit in the file) says of them:
its unsupervised task over four folders of results, and its two measures with void pixels of every object by its id over all frames.
`python -m tests.davis_cases CHECKOUT_OF_THE_TOOLKIT` asks it again.
"""

import hashlib

import numpy as np

VOID = 255
ANNOTATORS = 4
NAMES = ("shifted", "swapped", "missing", "extra", "void", "gaps", "late", "nothing", "full", "crowd", "large")


def discs(rng, count, frames, height, width):
    """[T, H, W] ids of discs that wander, grow and hide each other."""
    y, x = np.mgrid[:height, :width]
    ids = np.zeros((frames, height, width), np.uint8)
    for index in range(1, count + 1):
        top, left, radius = rng.integers(5, height - 5), rng.integers(5, width - 5), rng.integers(4, height // 4)
        for frame in ids:
            frame[(y - top) ** 2 + (x - left) ** 2 <= radius**2] = index
            top, left, radius = top + rng.integers(-2, 3), left + rng.integers(-2, 4), max(radius + rng.integers(-1, 2), 2)
    return ids


def moved(rng, ids):
    """Every frame by a few pixels."""
    return np.stack([np.roll(frame, tuple(rng.integers(-2, 3, 2)), (0, 1)) for frame in ids])


def video(name, annotator):
    """Annotated and found ids, two [T, H, W] uint8; what is annotated is the same for every annotator."""
    rng = np.random.default_rng([NAMES.index(name), 0])
    count, size = {"crowd": (5, (48, 72)), "large": (2, (240, 320)), "full": (1, (36, 50))}.get(name, (3, (40, 60)))
    annotated = discs(rng, count, 9 if name == "crowd" else 6, *size)
    rng = np.random.default_rng([NAMES.index(name), 1 + annotator])
    found = moved(rng, annotated)
    if name == "swapped":
        found = np.array([0, 2, 3, 1], np.uint8)[found]
    elif name == "missing":
        found[found == 2] = 0
    elif name == "extra":
        annotated[annotated == 3] = 0
    elif name == "void":
        annotated[:, 8:20, 10:40] = VOID
    elif name == "gaps":
        annotated[1:3][annotated[1:3] == 1] = 0
        found[2:4][found[2:4] == 1] = 0
        found[4] = annotated[3] = 0
    elif name == "late":
        annotated[:2][annotated[:2] == 3] = 0
        found[3:][found[3:] == 3] = 0
    elif name == "nothing":
        found[:] = 0
    elif name == "full":
        annotated[2:] = 1
        found[3:] = 1
    elif name == "crowd":
        found = rng.permutation(6).astype(np.uint8)[found]
        annotated[3:, :, 30:34] = VOID
    return annotated, found


def checksum():
    """Of all videos: expected figures hold only while it stays."""
    digest = hashlib.sha256()
    for name in NAMES:
        for annotator in range(ANNOTATORS):
            for ids in video(name, annotator):
                digest.update(f"{ids.shape}".encode() + ids.tobytes())
    return digest.hexdigest()


def main(toolkit):
    """Asks the toolkit, a checkout of it with what it needs installed, and writes what it says."""
    import json
    import subprocess
    import sys
    import tempfile
    from pathlib import Path

    from PIL import Image

    sys.path.insert(0, toolkit)
    from davis2017.evaluation import DAVISEvaluation
    from davis2017.metrics import db_eval_boundary, db_eval_iou

    def write(folder, ids, suffix="png"):
        folder.mkdir(parents=True)
        for frame, picture in enumerate(ids):
            Image.fromarray(picture).save(folder / f"{frame:05}.{suffix}")

    def rounded(values):
        return [round(float(value), 9) for value in values]

    commit = subprocess.run(["git", "-C", toolkit, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    said = {"toolkit": commit, "checksum": checksum(), "unsupervised": [], "by_id": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "ImageSets" / "2017").mkdir(parents=True)
        (root / "ImageSets" / "2017" / "val.txt").write_text("\n".join(NAMES))
        for annotator in range(ANNOTATORS):
            by_id = {}
            for name in NAMES:
                annotated, found = video(name, annotator)
                write(root / f"results{annotator}" / name, found)
                if not annotator:
                    write(root / "Annotations_unsupervised" / "480p" / name, annotated)
                    write(root / "JPEGImages" / "480p" / name, annotated, "jpg")
                objects = sorted({*np.unique(annotated).tolist()} - {0, VOID})
                masks = {index: (annotated == index, found == index, annotated == VOID) for index in objects}
                by_id[name] = {i: rounded(measure(*own).mean() for measure in (db_eval_iou, db_eval_boundary)) for i, own in masks.items()}
            said["by_id"].append(by_id)
            result = DAVISEvaluation(folder, "unsupervised", "val").evaluate(str(root / f"results{annotator}"))
            columns = [np.mean(result[measure][column]) for measure in "JF" for column in "MRD"]
            objects = {name: rounded(result[measure]["M_per_object"][name] for measure in "JF") for name in result["J"]["M_per_object"]}
            said["unsupervised"].append({"global": rounded([(columns[0] + columns[3]) / 2, *columns]), "objects": objects})
    (Path(__file__).parent / "data" / "davis_toolkit.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
