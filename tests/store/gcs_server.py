"""A store that speaks as much of Google's XML interface as the package uses, in this process."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def gcs_server() -> Iterator[dict[str, str]]:
    """The environment variables of a client, for the time of the block."""
    objects: dict[str, tuple[bytes, int]] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            wanted = self.headers.get("x-goog-if-generation-match")
            with lock:
                generation = objects.get(self.path, (b"", 0))[1]
                if wanted is not None and int(wanted) != generation:
                    self.answer(412)
                    return
                objects[self.path] = (content, generation + 1)
            self.answer(200, b"", content, generation + 1)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if "list-type" in self.path:
                self.answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
            elif path in objects:
                self.answer(200, objects[path][0], *objects[path])
            else:
                self.answer(404)

        def do_DELETE(self) -> None:
            self.answer(204 if objects.pop(self.path, None) else 404)

        do_HEAD = do_GET  # noqa: N815

        def answer(self, code: int, body: bytes = b"", content: bytes = b"", generation: int = 0) -> None:
            self.send_response(code)
            if generation:
                self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
                self.send_header("x-goog-generation", str(generation))
                self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    account = {"gcs_base_url": f"http://127.0.0.1:{server.server_port}", "disable_oauth": True}
    account |= {"client_email": "", "private_key": "", "private_key_id": ""}
    try:
        # The other variable's only part here is to permit HTTP.
        yield {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account), "AWS_ENDPOINT_URL": "http://unused"}
    finally:
        server.shutdown()
        server.server_close()
