from __future__ import annotations

import hashlib
import http.server
import io
import threading
import zipfile

import pytest

from recgrela_ext.data import Interactions, download
from recgrela_ext.errors import DataError

RATINGS = b"1::1193::5::978300760\n1::661::3::978302109\n" * 20_000


class Server(http.server.ThreadingHTTPServer):
    """Serves bytes from a dict on loopback; can cut one answer short, can ignore ranges."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut_after: int | None = None
        self.ranges = True
        self.starts: list[int] = []

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        content = self.server.files.get(self.path[1:])
        if content is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        start = int(asked[len("bytes=") : -1]) if asked and self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.server.starts.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body, self.server.cut_after = content[start:][: self.server.cut_after], None
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    one = Server()
    thread = threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture
def archive(server):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("ml-1m/ratings.dat", RATINGS)
    content = buffer.getvalue()
    server.files["ml-1m.zip"] = content
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    server.files["ml-1m.zip.md5"] = f"MD5 (ml-1m.zip) = {md5}\n".encode()
    return content


def test_download_unpacks_and_is_not_repeated(server, archive, tmp_path):
    folder = download.fetch_dataset("ml-1m", tmp_path, url=server.url("ml-1m.zip"))
    assert folder == tmp_path / "ml-1m"
    assert (folder / "ratings.dat").read_bytes() == RATINGS
    assert [path.name for path in tmp_path.iterdir()] == ["ml-1m"]
    count = len(server.starts)
    assert download.fetch_dataset("ml-1m", tmp_path, url=server.url("ml-1m.zip")) == folder
    assert len(server.starts) == count


def test_log_by_name(server, archive, tmp_path, monkeypatch):
    known = download.DataSet("https://example.org", server.url("ml-1m.zip"), "ml-1m")
    monkeypatch.setitem(download.DATASETS, "ml-1m", known)
    pytest.importorskip("pandas")
    log = Interactions.from_dataset("ml-1m", tmp_path, order="item_id")
    assert (len(log), log.num_items, log.name, log.order) == (40_000, 2, "ml-1m", "item_id")


def test_cut_download_leaves_no_torn_file_and_continues(server, archive, tmp_path):
    digest = hashlib.sha256(archive).hexdigest()
    target = tmp_path / "a.zip"
    server.cut_after = 1000
    with pytest.raises(DataError, match=r"must arrive whole, got .*1000"):
        download.download(server.url("ml-1m.zip"), target, digest)
    assert not target.exists()
    assert (tmp_path / "a.zip.part").stat().st_size == 1000
    download.download(server.url("ml-1m.zip"), target, digest)
    assert target.read_bytes() == archive
    assert server.starts == [0, 1000]


def test_server_without_ranges_begins_anew(server, archive, tmp_path):
    server.ranges = False
    target = tmp_path / "a.zip"
    (tmp_path / "a.zip.part").write_bytes(archive[:50])
    download.download(server.url("ml-1m.zip"), target, hashlib.sha256(archive).hexdigest())
    assert target.read_bytes() == archive


def test_whole_part_file_needs_no_network(tmp_path):
    (tmp_path / "a.part").write_bytes(b"whole")
    digest = hashlib.sha256(b"whole").hexdigest()
    download.download("http://127.0.0.1:1/a", tmp_path / "a", digest)
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_longer_part_file_is_replaced(server, archive, tmp_path):
    (tmp_path / "a.part").write_bytes(archive + b"more")
    download.download(server.url("ml-1m.zip"), tmp_path / "a", hashlib.sha256(archive).hexdigest())
    assert (tmp_path / "a").read_bytes() == archive


def test_wrong_checksum_removes_the_part(server, archive, tmp_path):
    with pytest.raises(DataError, match=r"checksum of .* must be 0000"):
        download.download(server.url("ml-1m.zip"), tmp_path / "a.zip", "0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_file_url(archive, tmp_path):
    (tmp_path / "source.zip").write_bytes(archive)
    target = download.download(
        (tmp_path / "source.zip").as_uri(), tmp_path / "a.zip", hashlib.sha256(archive).hexdigest()
    )
    assert target.read_bytes() == archive


@pytest.mark.parametrize("name", ["netflix", "lfm1b", "lfm1b-artists", "tmall"])
def test_terms_name_the_page(name, tmp_path):
    page = download.DATASETS[name].page
    with pytest.raises(DataError, match=f"terms must be accepted at {page}"):
        download.fetch_dataset(name, tmp_path)


def test_clear_errors(server, tmp_path):
    with pytest.raises(DataError, match=r"name must be one of ml-100k, .* got 'ml-7m'"):
        download.fetch_dataset("ml-7m", tmp_path)
    with pytest.raises(DataError, match="must be reachable, got HTTP 404"):
        download.fetch_dataset("ml-1m", tmp_path, url=server.url("gone.zip"))
    with pytest.raises(DataError, match="must be reachable, got"):
        download.download("http://127.0.0.1:1/x", tmp_path / "x", "0" * 32)
    with pytest.raises(DataError, match="checksum must be an md5 or a sha256, got 'abc'"):
        download.download(server.url("x"), tmp_path / "x", "abc")
    server.files["text.md5"] = b"no sum here"
    with pytest.raises(DataError, match="must hold an md5"):
        download.published_md5(server.url("text.md5"))
    server.files["bad.zip"] = b"not a zip"
    digest = hashlib.sha256(b"not a zip").hexdigest()
    with pytest.raises(DataError, match="must be a zip archive"):
        download.fetch_dataset("ml-1m", tmp_path, url=server.url("bad.zip"), checksum=digest)
    assert not (tmp_path / "ml-1m").exists()
