"""Servers of files on this machine: one that fails in the ways that servers do, and one of S3."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass
class Files:
    """A folder behind HTTP. `faults[name]` are what the next answers with this file do instead."""

    url: str
    faults: dict[str, list[str]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)


@contextmanager
def serving(folder: Path) -> Iterator[Files]:
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            files.asked[name] += 1
            planned = files.faults.get(name, [])
            fault = planned.pop(0) if planned else ""
            if fault.isdigit():
                self.send_error(int(fault))
            elif fault:
                self.broken(fault, (folder / self.path.lstrip("/")).read_bytes())
            else:
                super().do_GET()

        def broken(self, fault: str, content: bytes) -> None:
            self.send_response(200)
            if fault == "page":
                content = b"<html>come back later</html>"
            if fault == "long":
                content += b"0" * 999
            if fault != "short without a length":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            half = content[: len(content) // 2]
            if fault in ("silent", "frozen"):
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

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        files = Files(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield files
        server.shutdown()


@contextmanager
def buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server with the bucket `pictures`; the environment leads there."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    words = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "mine",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="pictures")
    yield "s3://pictures"
    server.stop()
