"""A small stand-in for the hub on 127.0.0.1, with HEAD, GET and Range, that can cut a connection on purpose."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """Files by URL path; what was asked is kept in `requests` as (method, path, Range header)."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)  # as the hub sends large files to its content network
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    stall_after_bytes: int | None = None  # send so much, then nothing, with the connection open
    release: threading.Event = field(default_factory=threading.Event)
    ignore_range: bool = False

    def ranges(self, ending: str) -> list[str | None]:
        """Range headers of the GET requests for paths with this ending."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(ending)]


@contextmanager
def serve() -> Iterator[HubServer]:
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Keep test output clean."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def head(self, status: int, length: int, headers: dict[str, object]) -> None:
            self.send_response(status)
            for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": length, **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()

        def answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            wanted = self.headers.get("Range")
            hub.requests.append((self.command, path, wanted))
            if path in hub.redirects:
                target = hub.files[hub.redirects[path]]
                linked = {"X-Linked-Size": len(target), "X-Linked-Etag": f'"{hashlib.sha256(target).hexdigest()}"'}
                return self.head(302, 0, {"Location": f"{hub.url}{hub.redirects[path]}", **linked})
            content = hub.files.get(path)
            if content is None:
                return self.head(404, 0, {})
            match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
            start = int(match[1]) if match and not hub.ignore_range else 0
            place = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
            etag = {"ETag": f'"{hub.etags.get(path, hashlib.sha256(content).hexdigest())}"'}
            self.head(206 if start else 200, len(content) - start, etag | place)
            if not body:
                return
            if hub.stall_after_bytes is not None:
                self.wfile.write(content[start : hub.stall_after_bytes])
                self.wfile.flush()
                hub.release.wait(600)
                self.close_connection = True
                return
            self.wfile.write(content[start:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
