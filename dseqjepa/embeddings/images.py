"""The images that are to be embedded: files, folders, lists of paths, or what `data=` names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dseqjepa.data.decode import ENDINGS
from dseqjepa.data.images import ImageFiles, ImageFolder, existing_folder, images_below
from dseqjepa.data.labelled import open_source
from dseqjepa.data.scenes import SPECS
from dseqjepa.data.source import Source, Split
from dseqjepa.errors import InputError, did_you_mean


def named_images(words: Sequence[str]) -> Source:
    """Every image of the files, folders and lists (`.txt`, a path a line) that are named.

    One folder alone brings its classes along. `InputError` where something is not there.
    """
    if len(words) == 1 and Path(words[0]).expanduser().is_dir():
        return ImageFolder(Path(words[0]).expanduser())
    paths: list[str] = []
    for word in words:
        path = Path(word).expanduser()
        if path.suffix.lower() == ".txt" and path.is_file():
            paths += _listed(path)
        elif path.is_file():
            paths.append(str(path))
        elif path.suffix.lower() in ENDINGS and not path.exists():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise InputError(f"no such image: {path}{did_you_mean(path.name, siblings)}")
        else:
            found, _ = images_below(existing_folder(path))
            paths += [str(path / name) for name in found]
    return ImageFiles(Path(), list(dict.fromkeys(paths)))


def _listed(path: Path) -> list[str]:
    """The paths of a list: from the working folder, or else from where the list lies."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the list {path} cannot be read: {error}") from None
    places = []
    for line in filter(None, map(str.strip, lines)):
        here = next((p for p in (Path(line), path.parent / line) if p.is_file()), None)
        if here is None:
            raise InputError(f"the list {path} names {line}, which is no file")
        places.append(str(here))
    if not places:
        raise InputError(f"the list {path} names no file")
    return places


def data_images(spec: str, split: Split, **how: Any) -> Source:
    """What `data=` names; of a folder all of it."""
    if spec not in SPECS and Path(spec).expanduser().is_dir():
        return ImageFolder(Path(spec).expanduser())
    return open_source(spec, split=split, **how)


def name_of(source: Source, index: int) -> str:
    """An image's name from where its data begins."""
    name = source.name(index)
    return name.removeprefix(f"{source.root}/") if isinstance(source, ImageFiles) else name
