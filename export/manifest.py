"""What stands beside every engine, as <component>.json: what it was made from and what the gate measured. A server starts with no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

BLOCK = 1 << 20
EVERY = 64 * BLOCK
"""A fingerprint reads one block of so many bytes: a broken copy is found without reading gigabytes at every start."""

Gate = dict[str, dict[str, float]]
"""Output to what was measured of it: `error`, `cosine`, `p99_error` and, of some, `matched` or `mask_iou` (export/gate.py)."""


class ManifestError(Exception):
    """An engine is not what its manifest says, or has none; the message says how to mend it."""


@dataclass(frozen=True)
class Manifest:
    """A record of one engine.

    Args:
        component: its name.
        engine_kind, precision: as in `export.runners.Engine`.
        source: sha256 of all that it was made from: weights, code, settings and versions.
        machine: what it is bound to, or "any" (`export.runners.machine_of`).
        versions: package to version, of those that made it.
        ranges: dynamic size to least, usual and largest value.
        gate: figures of every output against torch in float32.
        seconds: that it took to make.
        files: name to bytes and fingerprint.
    """

    component: str
    engine_kind: str
    precision: str
    source: str
    machine: str
    versions: dict[str, str]
    ranges: dict[str, tuple[int, int, int]]
    gate: Gate
    seconds: float
    files: dict[str, tuple[int, str]]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    def write(self, folder: Path) -> None:
        (folder / f"{self.component}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")


def read(folder: Path, component: str) -> Manifest:
    """The manifest of a component's engine in a folder; raises ManifestError where it is missing or cannot be read."""
    path = folder / f"{component}.json"
    try:
        fields = json.loads(path.read_text())
        return Manifest(
            **{
                **fields,
                "ranges": {name: tuple(sizes) for name, sizes in fields["ranges"].items()},
                "files": {name: tuple(known) for name, known in fields["files"].items()},
            }
        )
    except FileNotFoundError:
        raise ManifestError(f"{component}: no {path.name} in {folder}. {MEND}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ManifestError(f"{path}: cannot be read ({error!r}). {MEND}") from error


MEND = "Make the engine anew: sparrow export CHECKPOINT -o REPOSITORY"


def check(folder: Path, component: str, settings: Mapping[str, str], files: Iterable[str] = ()) -> Manifest:
    """The manifest of an engine that may be run.

    Args:
        folder: holds both.
        component: its name.
        settings: fields of the manifest that are expected.
        files: names that have to be among its files.
    Raises:
        ManifestError: it has no manifest, was made with other settings or other files, or these are not as they were written.
    """
    manifest = read(folder, component)
    for name, expected in settings.items():
        if (got := getattr(manifest, name)) != expected:
            raise ManifestError(f"{component}: got {name} {got} in {folder}, expected {expected}. {MEND}")
    for name in (*files, *manifest.files):
        if name not in manifest.files or not (folder / name).exists():
            raise ManifestError(f"{component}: no {name} in {folder}. {MEND}")
    for name, (size, known) in manifest.files.items():
        path = folder / name
        if (got := path.stat().st_size) != size:
            raise ManifestError(f"{path}: got {got} bytes, expected {size}: it was cut off or replaced. {MEND}")
        if fingerprint(path) != known:
            raise ManifestError(f"{path}: its content is not what was written: it is damaged or was replaced. {MEND}")
    return manifest


def fingerprint(path: Path) -> str:
    """sha256 of a file's size and of blocks throughout it, the last one included."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in (*range(0, size, EVERY), max(0, size - BLOCK)):
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """sha256 of whole files with their names, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
