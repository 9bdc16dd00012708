"""The script that fetches the example's data: where it looks, what it installs, downloads and refuses."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from repo import REPO

EXAMPLE = REPO / "examples" / "fashion_mnist"
CONTENT = {"a.gz": b"first file" * 100, "b.gz": b"second file"}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


get_data = load("get_data")


def put(folder: Path, **changed: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(gzip.compress(changed.get(name[0], content)))
    return folder


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address of a web server that serves it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_both_files_look_in_the_same_places_for_the_same_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = load("data")
    assert set(get_data.CONTENT_SHA256) == set(data.FILES.values())
    assert get_data.search_path() == data.search_path()
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert get_data.search_path() == data.search_path()
    assert get_data.search_path()[0] == tmp_path


def test_files_are_downloaded_checked_and_found(served: tuple[Path, str], tmp_path: Path) -> None:
    put(served[0])
    cache = tmp_path / "cache"
    get_data.download([served[1]], cache, DIGESTS)
    assert get_data.find([tmp_path / "gone", cache], DIGESTS) == cache
    assert sorted(p.name for p in cache.iterdir()) == ["a.gz", "b.gz"]


def test_how_a_file_was_packed_does_not_matter(tmp_path: Path) -> None:
    put(tmp_path)
    (tmp_path / "a.gz").write_bytes(gzip.compress(CONTENT["a.gz"], compresslevel=1, mtime=7))
    assert get_data.find([tmp_path], DIGESTS) == tmp_path


def test_tampered_content_is_refused_and_nothing_is_kept(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    put(served[0], b=b"second fiIe")
    with pytest.raises(get_data.Failed, match=r"must unpack to SHA-256 .*, but has"):
        get_data.download([served[1]], tmp_path / "cache", DIGESTS)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["a.gz"]


def test_the_next_address_is_tried_and_whole_files_are_kept(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    put(served[0])
    bad = put(tmp_path / "bad", a=b"tampered")
    cache = put(tmp_path / "cache")
    (cache / "a.gz").write_bytes(b"cut")
    kept = (cache / "b.gz").stat().st_mtime_ns
    get_data.download([bad.as_uri(), served[1]], cache, DIGESTS)
    assert get_data.find([cache], DIGESTS) == cache
    assert (cache / "b.gz").stat().st_mtime_ns == kept


@pytest.mark.parametrize("damage", ["missing", "cut", "text"])
def test_a_damaged_or_missing_file_says_why(
    served: tuple[Path, str], tmp_path: Path, damage: str
) -> None:
    put(served[0])
    file = served[0] / "a.gz"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5] if damage == "cut" else b"<html>busy</html>")
    with pytest.raises(get_data.Failed, match="404" if damage == "missing" else "not a whole gzip"):
        get_data.download([served[1]], tmp_path / "cache", DIGESTS)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_server_that_does_not_answer_says_so(tmp_path: Path) -> None:
    with pytest.raises(get_data.Failed, match=r"http://127\.0\.0\.1:9/a\.gz"):
        get_data.download(["http://127.0.0.1:9"], tmp_path / "cache", DIGESTS)


def test_too_much_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_data, "MAX_CONTENT_BYTES", 500)
    served = put(tmp_path / "served")
    with pytest.raises(get_data.Failed, match="unpacks to more than 500 bytes"):
        get_data.download([served.as_uri()], tmp_path / "cache", DIGESTS)
    monkeypatch.setattr(get_data, "MAX_PACKED_BYTES", 10)
    with pytest.raises(get_data.Failed, match="sends more than 10 bytes"):
        get_data.download([served.as_uri()], tmp_path / "cache", DIGESTS)


def test_a_found_file_with_other_content_is_pointed_out(tmp_path: Path) -> None:
    put(tmp_path, a=b"other")
    with pytest.raises(get_data.Failed, match=r"not the original: a\.gz.*; remove it"):
        get_data.find([tmp_path], DIGESTS)


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_package_is_installed_with_apt_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_dir, log = tmp_path / "bin", tmp_path / "log"
    tool(bin_dir, "apt-get", f'echo "$@" >> {log}')
    tool(bin_dir, "sudo", 'test "$1" = -n && shift && "$@"')
    tool(bin_dir, "true", "exit 0")
    monkeypatch.setenv("PATH", str(bin_dir))
    get_data.install_package()
    assert log.read_text().splitlines() == ["update", "install -y dataset-fashion-mnist"]


def test_a_failing_or_missing_apt_get_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    monkeypatch.setenv("PATH", str(bin_dir))
    with pytest.raises(get_data.Failed, match="there is no apt-get"):
        get_data.install_package()
    tool(bin_dir, "apt-get", "echo no lock >&2; exit 100")
    tool(bin_dir, "sudo", 'test "$1" = -n && shift && "$@"')
    tool(bin_dir, "true", "exit 0")
    with pytest.raises(get_data.Failed, match="ended with 100: no lock"):
        get_data.install_package()


def test_without_any_way_the_exit_code_is_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(get_data, "DEBIAN_DIR", tmp_path / "not-installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    assert get_data.main(["--no-install", "--address", (tmp_path / "empty").as_uri()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "put the four .gz files" in captured.err
    assert str(tmp_path / "cache" / "edgeprune" / "fashion-mnist") in captured.err


def test_main_downloads_into_the_cache_and_prints_where(
    tmp_path: Path,
    served: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(served[0])
    monkeypatch.setattr(get_data, "DEBIAN_DIR", tmp_path / "not-installed")
    monkeypatch.setattr(get_data, "CONTENT_SHA256", DIGESTS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    assert get_data.main(["--no-install", "--address", served[1]]) == 0
    assert capsys.readouterr().out.strip() == str(get_data.cache_dir())


def test_a_tampered_folder_that_comes_first_ends_the_script_with_2(tmp_path: Path) -> None:
    for name in get_data.CONTENT_SHA256:
        (tmp_path / name).write_bytes(gzip.compress(b"not fashion"))
    done = run_script(tmp_path, "--no-install", named=tmp_path)
    assert done.returncode == 2
    assert "not the original: train-images-idx3-ubyte.gz" in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(not get_data.DEBIAN_DIR.is_dir(), reason="needs dataset-fashion-mnist")
def test_the_real_data_is_found_whole(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--no-install")
    assert (done.returncode, done.stdout.strip()) == (0, str(get_data.DEBIAN_DIR))


def run_script(
    cache: Path, *arguments: str, named: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    environment.pop("FASHION_MNIST_DIR", None)
    if named is not None:
        environment["FASHION_MNIST_DIR"] = str(named)
    return subprocess.run(
        [sys.executable, "-I", str(EXAMPLE / "get_data.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
