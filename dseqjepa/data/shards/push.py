"""Shards to where machines can fetch them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dseqjepa.data.images import HELD_OUT_FOLDERS, existing_folder
from dseqjepa.data.shards.index import LIST, RECORDS, list_text, open_index, rows_behind
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
            there = rows_behind(home)
            done = {s.name: s for s in index.shards if there.get(s.name) == s and home.has(s.entry)}
            for shard in index.shards:
                is_new = shard.name not in done
                if is_new:
                    # From the first to the last change the list says what can be relied on there.
                    rows = list_text(index.classes, done.values(), unfinished=True)
                    home.put(LIST, rows.encode())
                    home.put(shard.name, path / shard.name)
                    done[shard.name] = shard
                tell(f"{'copied' if is_new else 'there'}: {home.url}/{shard.name}")
                copied += is_new
            for name in (RECORDS, LIST):
                home.put(name, path / name)
                tell(f"copied: {home.url}/{name}")
                copied += 1
    except (OSError, NotImplementedError) as error:
        raise InputError(f"cannot copy to {printable(url)}: {error}") from error
    return copied
