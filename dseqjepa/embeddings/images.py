"""Opening the images to embed: files, folders, lists of paths, or a `data=` source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dseqjepa.config import Section
from dseqjepa.data.decode import ENDINGS
from dseqjepa.data.images import (
    ImageFiles,
    ImageFolder,
    PixelRange,
    existing_folder,
    images_below,
    no_such_image,
)
from dseqjepa.data.labelled import check_size, open_source
from dseqjepa.data.scenes import SPECS
from dseqjepa.data.source import Source, Split
from dseqjepa.errors import InputError


def named_images(words: Sequence[str], pixel_range: PixelRange = "auto") -> Source:
    """All images of the given files, folders and lists (`.txt`, one path per line).

    A single folder also yields its classes. `InputError` if something does not exist.
    """
    source = _named(words)
    source.pixel_range = pixel_range
    return source


def _named(words: Sequence[str]) -> ImageFiles:
    if len(words) == 1 and Path(words[0]).expanduser().is_dir():
        return ImageFolder(Path(words[0]).expanduser())
    paths: list[str] = []
    notes: list[str] = []
    for word in words:
        path = Path(word).expanduser()
        if path.suffix.lower() == ".txt" and path.is_file():
            paths += _listed(path)
        elif path.is_file():
            paths.append(str(path))
        elif path.suffix.lower() in ENDINGS and not path.exists():
            raise no_such_image(path)
        else:
            found, left_out = images_below(existing_folder(path))
            paths += [str(path / name) for name in found]
            notes += left_out
    files = ImageFiles(Path(), list(dict.fromkeys(paths)))
    files.notes = tuple(notes)
    return files


def _listed(path: Path) -> list[str]:
    """The paths of a list, relative to the working folder or else to the list's folder."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows begins with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the list {path} cannot be read: {error}") from None
    places = []
    for line in filter(None, map(str.strip, lines)):
        named = Path(line).expanduser()
        here = next((p for p in (named, path.parent / named) if p.is_file()), None)
        if here is None:
            raise InputError(f"the list {path} names {line}, which is not a file")
        places.append(str(here))
    if not places:
        raise InputError(f"the list {path} names no file")
    return places


def check_selection(words: Sequence[str], data: str | None, config: Section) -> None:
    """`InputError` if a config selects images in a way that has no effect on what is read."""
    given = config.model_fields_set
    for key in ("size", "split"):
        if words and key in given:
            raise InputError(
                f"{key}= selects images of data=, but images are named: leave one of them out"
            )
    if "size" in given:
        check_size(data or "the run")


def data_images(
    spec: str,
    split: Literal["auto", "train", "val"],
    usual: Split,
    *,
    pixel_range: PixelRange,
    **how: Any,
) -> Source:
    """The source that `data=` names; with split `auto` a folder is read whole, and of other data
    the `usual` part. `InputError` if a folder has no such part."""
    if spec in SPECS or not Path(spec).expanduser().is_dir():
        part = usual if split == "auto" else split
        return open_source(spec, split=part, pixel_range=pixel_range, **how)
    source = ImageFolder(Path(spec).expanduser(), "all" if split == "auto" else split)
    source.pixel_range = pixel_range
    if split != "auto" and not source.has_splits:
        raise InputError(
            f"split={split}: {spec} has no folders train and val: leave out split= to read it whole"
        )
    return source
