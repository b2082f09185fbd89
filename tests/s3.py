"""A small S3 object store with conditional puts, and faults on demand."""

import hashlib
import re
import threading
from collections import Counter
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import time
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest


class Bucket:
    """Content and behaviour of the store.

    Attributes:
        objects: data, tag and time of each key.
        deaf: ignore the conditions of puts.
        full: report a full disk for puts of keys that match this pattern.
        denied: deny puts of keys that match this pattern.
        lost: number of next puts that succeed but return an error, so that the client retries.
        puts: how often each key was written.
    """

    def __init__(self):
        self.objects, self.deaf, self.denied, self.full, self.lost = {}, False, None, None, 0
        self.lock, self.puts = threading.Lock(), Counter()

    def put(self, key, data, match, none_match):
        """Stores an object if its conditions are met; returns HTTP status and tag."""
        with self.lock:
            stored = self.objects.get(key)
            if self.denied and re.search(self.denied, key):
                return 403, ""
            if self.full and re.search(self.full, key):
                return 507, ""
            if not self.deaf:
                if none_match == "*" and stored:
                    return 412, ""
                if match and not stored:
                    return 404, ""
                if match and match != stored[1]:
                    return 412, ""
            self.puts[key] += 1
            tag = f'"{hashlib.md5(data).hexdigest()}-{self.puts[key]}"'
            self.objects[key] = data, tag, time()
            if self.lost:
                self.lost -= 1
                return 500, ""
            return 200, tag


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer waits 40 ms for an acknowledgement

    def log_message(self, *args):
        pass

    @property
    def key(self):
        return unquote(urlsplit(self.path).path).partition("/")[2].partition("/")[2]

    @property
    def query(self):
        return parse_qs(urlsplit(self.path).query, keep_blank_values=True)

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if self.command != "HEAD" or "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        data = self.body()
        match, none = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        status, tag = self.server.bucket.put(self.key, data, match, none)
        self.answer(status, b"" if status == 200 else b"<Error/>", **({"ETag": tag} if tag else {}))

    def do_GET(self):
        if "list-type" in self.query:
            self.list()
            return
        stored = self.server.bucket.objects.get(self.key)
        if not stored:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        data, tag, when = stored
        headers = {"ETag": tag, "Last_Modified": formatdate(when, usegmt=True)}
        if part := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            start = int(part[1]) if part[1] else len(data) - int(part[2])
            stop = int(part[2]) + 1 if part[1] and part[2] else len(data)
            headers["Content_Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            self.answer(206, data[start:stop], **headers)
        elif self.command == "HEAD":
            self.answer(200, Content_Length=str(len(data)), **headers)
        else:
            self.answer(200, data, **headers)

    do_HEAD = do_GET  # noqa: N815

    def list(self):
        prefix, after = (self.query.get(name, [""])[0] for name in ("prefix", "continuation-token"))
        keys = sorted(key for key in [*self.server.bucket.objects] if key.startswith(prefix))
        page = [key for key in keys if key > after][:7]  # short, so that clients must follow pages
        more = bool(page) and page[-1] != keys[-1]
        parts = []
        for key in page:
            data, tag, when = self.server.bucket.objects[key]
            parts.append(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>{escape(tag)}"
                f"</ETag><LastModified>{_iso(when)}</LastModified></Contents>"
            )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(parts)}"
            "</ListBucketResult>"
        )
        self.answer(200, body.encode(), Content_Type="application/xml")

    def do_DELETE(self):
        self.server.bucket.objects.pop(self.key, None)
        self.answer(204)

    def do_POST(self):
        keys = re.findall(r"<Key>(.*?)</Key>", self.body().decode())
        for key in keys:
            self.server.bucket.objects.pop(key, None)
        gone = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self.answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode())


def _iso(when):
    from datetime import UTC, datetime

    return (
        datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )


@contextmanager
def serving():
    """Yields a bucket, and the environment variables of processes that use it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.bucket = True, Bucket()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_REGION": "nowhere",
    }
    try:
        yield server.bucket, environment
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def moto_bucket():
    """The bucket of moto's server, which starts once."""
    from tests.moto_s3 import serving_moto  # slow to import

    with serving_moto() as bucket:
        yield bucket


@pytest.fixture
def faulty(monkeypatch):
    """Our object store at s3://bucket, with faults on demand, only for this test."""
    with serving() as (bucket, environment):
        bucket.environment = environment
        with _at_hand(bucket, monkeypatch):
            yield bucket


@pytest.fixture(params=["ours", "moto"])
def bucket(request, monkeypatch):
    """An empty object store at s3://bucket: ours, and an independent one."""
    if request.param == "ours":
        yield request.getfixturevalue("faulty")
        return
    bucket = request.getfixturevalue("moto_bucket")
    bucket.objects.clear()
    bucket.puts.clear()
    with _at_hand(bucket, monkeypatch):
        yield bucket


@contextmanager
def _at_hand(bucket, monkeypatch):
    """Lets the clients of this process use a bucket."""
    from unet_ray.storage import objects

    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    objects.client_of.cache_clear()
    yield
    objects.client_of.cache_clear()
