"""Servers of files on this machine that fail in the ways that servers do: of HTTP, and of S3."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from dseqjepa.data import patience
from dseqjepa.data.shards import remote

SPOKEN = {"connection", "content-length", "date", "server", "transfer-encoding"}
"""Headers that are of a connection, not of what is answered."""
ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>so it is</Message></Error>"
CODES = {
    "500": "InternalError", "503": "SlowDown", "408": "RequestTimeout", "429": "SlowDown",
    "403": "AccessDenied", "404": "NoSuchKey",
}  # fmt: skip
"""An error as S3 words it."""
PACE = 0.3
"""Seconds between the pieces of a slow answer."""
TRICKLE = 60
"""Seconds for which an answer comes byte by byte."""


def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, silence: float) -> Path:
    """An empty cache of this test alone; `silence` seconds are granted to servers, and there
    is no pause between tries."""
    monkeypatch.setenv(remote.FOLDER, str(folder / "cache"))
    monkeypatch.setattr(remote, "SILENCE", silence)
    monkeypatch.setattr(patience, "WAITS", (0.0,) * len(patience.WAITS))
    return folder / "cache"


@dataclass
class Files:
    """What a server offers. `faults[name]` are what the next answers with this file do instead;
    `faults["PUT NAME"]` the errors with which it is not taken."""

    url: str
    faults: dict[str, list[str]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    sends_parts: bool = True
    """Whether it answers a request for a part of a file with that part."""


Answer = tuple[int, dict[str, str], bytes]


class _Faulty(SimpleHTTPRequestHandler):
    """Asks `answer` what a file is, and does with it what is planned."""

    files: Files
    protocol_version = "HTTP/1.1"

    def answer(self) -> Answer:
        raise NotImplementedError

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).rstrip("/").rpartition("/")[2]
        self.files.asked[name] += 1
        planned = self.files.faults.get(name, [])
        fault = planned.pop(0) if planned else ""
        if fault.isdigit():
            self.fail(fault)
        elif fault:
            self.broken(fault, *self.answer())
        else:
            self.send(*self.answer())

    def fail(self, status: str) -> None:
        self.send(int(status), {}, ERROR.format(CODES.get(status, "Other")).encode())

    def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.head(status, headers, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def head(self, status: int, headers: dict[str, str], size: int | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in SPOKEN:
                self.send_header(name, value)
        if size is not None:
            self.send_header("Content-Length", str(size))
        self.end_headers()

    def broken(self, fault: str, status: int, headers: dict[str, str], content: bytes) -> None:
        if fault == "page":
            content = b"<html>come back later</html>"
        if fault == "long":
            content += b"0" * 999
        self.head(status, headers, None if fault == "short without a length" else len(content))
        half = content[: len(content) // 2]
        if fault == "slow":
            for start in range(0, len(content), len(content) // 3 + 1):
                self.wfile.write(content[start : start + len(content) // 3 + 1])
                self.wfile.flush()
                time.sleep(PACE)
        elif fault == "trickle":
            with suppress(OSError):  # whoever asked has gone
                for byte in content[: round(TRICKLE / PACE)]:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(PACE)
        elif fault in ("silent", "frozen"):
            self.wfile.write(half)
            self.wfile.flush()
            time.sleep(12 if fault == "silent" else 300)
        elif fault == "flipped":
            self.wfile.write(half + bytes(255 - byte for byte in content[len(half) :]))
        elif fault in ("page", "long"):
            self.wfile.write(content)
        else:
            self.wfile.write(half)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


def _part(content: bytes, asked: str | None) -> Answer:
    """The part of a file that a request's header of a range asks for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
    if found is None:
        return 200, {}, content
    first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
    if first > last:
        return 416, {}, b""
    said = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
    return 206, said, content[first : last + 1]


@contextmanager
def _running(handler: type[_Faulty]) -> Iterator[Files]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        handler.files = Files(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler.files
        server.shutdown()


@contextmanager
def serving(folder: Path) -> Iterator[Files]:
    """A folder behind HTTP."""

    class Handler(_Faulty):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))

        def answer(self) -> Answer:
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                return 404, {}, b"not found"
            asked = self.headers.get("Range") if self.files.sends_parts else None
            return _part(path.read_bytes(), asked)

    with _running(Handler) as files:
        yield files


@contextmanager
def buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server with the bucket `pictures`; the environment leads there."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    # All servers of a process share their buckets.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    words = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "mine",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="pictures")
    s3fs.S3FileSystem.clear_instance_cache()  # they remember another test's server
    yield "s3://pictures"
    server.stop()


@contextmanager
def google_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """An empty bucket as Google Cloud Storage's JSON API shows it; the environment leads there."""
    import gcsfs
    from gcsfs.extended_gcsfs import BucketType

    async def kind(fs: object, bucket: str) -> BucketType:
        return BucketType.NON_HIERARCHICAL

    # It would ask a server of another protocol.
    monkeypatch.setattr(gcsfs.GCSFileSystem, "_get_bucket_type", kind)
    objects: dict[str, bytes] = {}

    class Handler(_Faulty):
        def answer(self) -> Answer:
            found = urlsplit(self.path)
            _, _, name = found.path.partition("/b/pictures/o")
            name = unquote(name.strip("/"))
            if not name:
                prefix = parse_qs(found.query).get("prefix", [""])[0]
                items = [facts(name) for name in objects if name.startswith(prefix)]
                return 200, {}, json.dumps({"items": items}).encode()
            if name not in objects:
                return 404, {}, b"not found"
            if "alt=media" in found.query:
                return _part(objects[name], self.headers.get("Range"))
            return 200, {}, json.dumps(facts(name)).encode()

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            _, about, content = sent.removesuffix(b"\n--==0==--").split(b"--==0==", 2)
            name = json.loads(about.partition(b"\n\n")[2])["name"]
            planned = self.files.faults.get(f"PUT {name.rpartition('/')[2]}", [])
            if planned:
                self.fail(planned.pop(0))
                return
            objects[name] = content.partition(b"\n\n")[2]
            self.send(200, {}, json.dumps(facts(name)).encode())

    def facts(name: str) -> dict[str, str]:
        etag = hashlib.sha256(objects[name]).hexdigest()
        return {"bucket": "pictures", "name": name, "size": str(len(objects[name])), "etag": etag}

    with _running(Handler) as files:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", files.url)
        gcsfs.GCSFileSystem.clear_instance_cache()
        files.url = "gs://pictures/mine"
        yield files


@contextmanager
def faulty_buckets(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Files]:
    """The files of a folder in a bucket of an S3 server behind one that fails."""
    import boto3
    import s3fs

    with buckets(monkeypatch) as bucket:
        for path in folder.iterdir():
            boto3.client("s3").upload_file(str(path), "pictures", f"mine/{path.name}")
        behind = urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc

        class Handler(_Faulty):
            def answer(self) -> Answer:
                server = http.client.HTTPConnection(behind)
                size = int(self.headers.get("Content-Length", 0))
                server.request(self.command, self.path, self.rfile.read(size), dict(self.headers))
                said = server.getresponse()
                headers = dict(said.getheaders())
                content = said.read()
                if self.command == "HEAD":  # has the size of what it does not send
                    headers["x-size"] = headers.get("Content-Length", "0")
                return said.status, headers, content

            def do_HEAD(self) -> None:
                status, headers, _ = self.answer()
                self.head(status, headers, int(headers["x-size"]))

            def do_PUT(self) -> None:
                name = urlsplit(self.path).path.rpartition("/")[2]
                planned = self.files.faults.get(f"PUT {name}", [])
                if planned[:1] == ["silent"]:
                    planned.pop(0)
                    time.sleep(12)
                elif planned:
                    self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    self.fail(planned.pop(0))
                else:
                    self.send(*self.answer())

            do_POST = do_DELETE = do_PUT

            def handle_expect_100(self) -> bool:
                """A client waits for this word, which a server that is silent does not send."""
                name = urlsplit(self.path).path.rpartition("/")[2]
                is_silent = self.files.faults.get(f"PUT {name}", [])[:1] == ["silent"]
                return is_silent or super().handle_expect_100()

        with _running(Handler) as files:
            monkeypatch.setenv("AWS_ENDPOINT_URL", files.url)
            s3fs.S3FileSystem.clear_instance_cache()
            files.url = f"{bucket}/mine"
            yield files
