"""The picture store: what every kind does, and what a local one does when it cannot write."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from broker.store import ObjectMissingError, Store, StoreError, StoreFullError, StoreRefusedError


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(f"file:{tmp_path / 'made' / 'for us'}" if request.param == "file" else "memory:")


async def test_put_get_list_delete(store: Store) -> None:
    store.put("outputs/a/x/0.png", b"one", "image/png")
    await store.put_async("outputs/a/x/1.png", b"two", "image/png")
    await store.put_async("outputs/ab/x/0.png", b"other", "image/png")
    store.put("outputs/a/x/0.png", b"once more", "image/png")
    assert store.get("outputs/a/x/0.png") == b"once more"
    assert await store.get_async("outputs/a/x/1.png") == b"two"
    assert sorted((entry.key, entry.size) for entry in store.list("outputs/a/")) == [
        ("outputs/a/x/0.png", 9),
        ("outputs/a/x/1.png", 3),
    ]
    assert store.delete_folder("outputs/a/") == 2
    assert store.delete_folder("outputs/a/") == 0
    with pytest.raises(ObjectMissingError, match=r"outputs/a/x/0\.png"):
        store.get("outputs/a/x/0.png")
    with pytest.raises(ObjectMissingError):
        await store.get_async("outputs/a/x/0.png")
    assert store.get("outputs/ab/x/0.png") == b"other"
    assert await store.size_async("outputs/ab/x/0.png") == 5
    assert b"".join([chunk async for chunk in await store.stream_async("outputs/ab/x/0.png", 1, 4)]) == b"the"
    for missing in (store.size_async("outputs/a/x/0.png"), store.stream_async("outputs/a/x/0.png", 0, 1)):
        with pytest.raises(ObjectMissingError):
            await missing
    assert store.errors == dict.fromkeys(store.errors, 0)
    assert store.check() is None
    assert [entry.key for entry in store.list("checks/")] == []
    assert not store.signs
    assert await store.sign("outputs/ab/x/0.png", 60) is None


@pytest.mark.parametrize("key", ["../outside", "outputs/../../outside", "/etc/passwd", "outputs//x", ""])
def test_no_key_leaves_the_folder(tmp_path: Path, key: str) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    store = Store(f"file:{tmp_path / 'store'}")
    with pytest.raises(StoreError):
        store.get(key)


def test_an_unwritable_store_is_one_clear_error(tmp_path: Path) -> None:
    store = Store(f"file:{tmp_path / 'store'}")
    (tmp_path / "store" / "outputs").write_bytes(b"a file where a folder should be")
    with pytest.raises(StoreError, match=r"the store failed on 'outputs/a/0\.png'"):
        store.put("outputs/a/0.png", b"x", "image/png")


@pytest.mark.parametrize("url", ["http://127.0.0.1/pictures", "ftp://pictures", "pictures", "file:{}/a file/store"])
def test_a_url_without_a_store_is_refused(tmp_path: Path, url: str) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(StoreRefusedError, match="DARKROOM_STORE_URL"):
        Store(url.format(tmp_path))


def test_a_store_that_cannot_be_written_says_so_at_start(tmp_path: Path) -> None:
    """On a real file system that is mounted for reading only, in a mount namespace of its own."""
    mount = f'mount -t tmpfs -o ro tmpfs {tmp_path} && exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], check=False).returncode:
        pytest.skip("needs a kernel that lets tests mount a file system of their own")
    check = "import sys; from broker.store import Store; Store('file:' + sys.argv[1]).check()"
    command = [*inside, sys.executable, "-c", check, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "StoreRefusedError: the store's folder cannot be written" in done.stderr, done.stderr
    assert "Read-only file system" in done.stderr


_TORN_WRITE = """
import sys
from broker.store import Store, StoreError
store = Store("file:" + sys.argv[1])
store.put("outputs/a/0.png", b"first", "image/png")
exec(sys.argv[2])
for key in ("outputs/a/0.png", "outputs/a/1.png"):
    try:
        store.put(key, b"x" * 200_000, "image/png")
    except StoreError as error:
        print(type(error).__name__, error)
assert store.get("outputs/a/0.png") == b"first"
assert [entry.key for entry in store.list("outputs/")] == ["outputs/a/0.png"]
assert len([path for path in store.folder.rglob("*") if path.is_file()]) == 1
"""
_NO_LARGE_FILES = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _TORN_WRITE, str(tmp_path / "store"), _NO_LARGE_FILES]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(shown) == 2, shown
    assert all("File too large" in line for line in shown)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """On a real file system of 64 KiB, in a mount namespace of its own."""
    mount = f'mount -t tmpfs -o size=64k tmpfs {tmp_path} && exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], check=False).returncode:
        pytest.skip("needs a kernel that lets tests mount a file system of their own")
    command = [*inside, sys.executable, "-c", _TORN_WRITE, str(tmp_path / "store"), ""]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(shown) == 2, shown
    assert all(line.startswith("StoreFullError the store is full: nothing was written to") for line in shown)


async def test_a_disk_that_turns_out_to_be_full_late_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems say so only when the bytes have to reach them."""
    store = Store(f"file:{tmp_path}")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFullError):
        store.put("outputs/a/x/0.png", b"x", "image/png")
    with pytest.raises(StoreFullError):
        await store.put_async("outputs/a/x/1.png", b"x", "image/png")
    assert list(store.list("")) == []


def test_torn_files_are_looked_for_beside_writers_and_other_janitors(tmp_path: Path) -> None:
    store = Store(f"file:{tmp_path}")

    def write_and_delete(writer: int) -> None:
        for number in range(300):
            store.put(f"outputs/{writer}-{number % 10}/x/0.png", b"x" * 2000, "image/png")
            store.delete_folder(f"outputs/{writer}-{(number + 5) % 10}/")

    writers = [threading.Thread(target=write_and_delete, args=(writer,)) for writer in range(2)]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        assert store.delete_torn(0.0) == 0
