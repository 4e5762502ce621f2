"""Shards to where machines can fetch them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dseqjepa.data.images import HELD_OUT_FOLDERS, existing_folder
from dseqjepa.data.shards.index import LIST, RECORDS, open_index
from dseqjepa.data.shards.remote import Remote, is_url
from dseqjepa.errors import InputError, printable


def push(folder: Path, url: str, *, tell: Callable[[str], None] = lambda line: None) -> int:
    """Copy tar files, those of splits too, and then their index; how many files were copied.

    Raises:
        InputError: there are no indexed tar files, or they cannot be copied there.
    """
    if not is_url(url):
        raise InputError(f"expected a URL such as s3://bucket/name, found {printable(url)}")
    parts = [
        part for part in ("train", *HELD_OUT_FOLDERS) if (existing_folder(folder) / part).is_dir()
    ]
    homes = [(folder / part, Remote(f"{url.rstrip('/')}/{part}")) for part in parts]
    homes = homes or [(folder, Remote(url.rstrip("/")))]
    indexes = [open_index(str(path)) for path, _ in homes]
    copied = 0
    try:
        for (path, home), index in zip(homes, indexes, strict=True):
            for name in (*(shard.name for shard in index.shards), RECORDS, LIST):
                is_new = home.put(path / name)
                tell(f"{'copied' if is_new else 'there'}: {home.url}/{name}")
                copied += is_new
    except (OSError, NotImplementedError) as error:
        raise InputError(f"cannot copy to {printable(url)}: {error}") from error
    return copied
