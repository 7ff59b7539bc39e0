"""Picture files: signed links that end, no path from a client, a cap, and nothing half-written."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tdm_app.database import connect
from tdm_app.errors import install_error_handlers
from tdm_app.feedback_table import purge as _purge_feedback
from tdm_app.refusal import Refused, install_refusals
from tdm_app.request_id import RequestId
from tdm_app.retention import forget, forgetting
from tdm_app.routes.files import files_router
from tdm_app.settings import Settings
from tdm_app.state import State
from tdm_app.store import Store, kept_until_s
from tdm_serve.errors import InvalidRequest

pytestmark = pytest.mark.anyio
PNG = b"\x89PNG\r\n\x1a\n" + bytes(92)
MIB = 2**20
Check = Callable[..., dict[str, Any]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, MIB)


@pytest.fixture
async def client(store: Store) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(files_router(store))
    install_error_handlers(app)
    install_refusals(app)
    app.add_middleware(RequestId)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.parametrize("extension", ["png", "jpeg", "webp"])
async def test_a_link_gives_the_picture(store: Store, client: httpx.AsyncClient, extension: str) -> None:
    file_id = await store.put(PNG, extension, 3600)
    response = await client.get(store.link(file_id, 60))
    assert response.status_code == 200
    assert response.content == PNG
    headers = response.headers
    assert headers["content-type"] == f"image/{extension}"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"] == f'inline; filename="{file_id}"'
    assert headers["cache-control"].startswith("private, max-age=")
    assert headers["cache-control"].endswith(", immutable")
    assert 55 <= int(headers["cache-control"].split("=")[1].split(",")[0]) <= 60
    head = await client.head(store.link(file_id, 60))
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "100")


async def test_links_end(store: Store, client: httpx.AsyncClient, assert_error: Check) -> None:
    file_id = await store.put(PNG, "png", 3600)
    assert_error(await client.get(store.link(file_id, -1)), 410, "link_expired")


async def test_no_link_outlives_its_file(store: Store) -> None:
    file_id = await store.put(PNG, "png", 100)
    assert f"expires={kept_until_s(file_id)}&" in store.link(file_id, 10**6)


async def test_a_link_to_what_was_deleted(store: Store, client: httpx.AsyncClient, assert_error: Check) -> None:
    file_id = await store.put(PNG, "png", 3600)
    await store.remove([file_id, file_id])
    assert_error(await client.get(store.link(file_id, 60)), 410, "picture_gone")


async def test_nothing_in_a_link_can_be_changed(store: Store, client: httpx.AsyncClient, assert_error: Check) -> None:
    mine, other = await store.put(PNG, "png", 3600), await store.put(PNG, "png", 3600)
    path, _, query = store.link(mine, 60).partition("?")
    expires, signature = (part.partition("=")[2] for part in query.split("&"))
    later = int(expires) + 1
    for changed in (
        f"/v1/files/{other}?{query}",
        f"{path}?expires={later}&signature={signature}",
        f"{path}?expires={expires}&signature={signature[:-1]}",
        f"{path}?expires={expires}&signature={signature}A",
        f"{path}?expires={expires}&signature=%F0%9F%98%80%ED",
        f"{path}?expires={expires}",
        path,
        "/v1/files/links.key?expires=0&signature=",
        f"/v1/files/..%2flinks.key?{query}",
        f"/v1/files/%2e%2e?{query}",
        f"/v1/files/{mine}%00?{query}",
        "/v1/files/file_00000000_aaaaaaaaaaaaaaaaaaaaaa.png?expires=99999999999&signature=AAAA",
    ):
        response = await client.get(changed)
        assert response.status_code in {403, 404}, (changed, response.text)
        assert response.json()["error"]["code"] in {"invalid_signature", "not_found"}
    assert_error(await client.get(f"{path}?expires=soon&signature={signature}"), 400, "invalid_value", "expires")


@pytest.mark.parametrize(
    "name", ["../links.key", "links.key", "/etc/passwd", "", "file_0_x.png", "file_00000000_../x.png"]
)
async def test_what_is_no_id_is_never_opened(store: Store, name: str) -> None:
    assert await store.get(name) is None
    with pytest.raises(Refused):
        store.check(name, 2**40, store._signature("file", 2**40))


async def test_links_survive_a_restart_but_not_another_key(tmp_path: Path, store: Store) -> None:
    file_id = await store.put(PNG, "png", 3600)
    _, _, query = store.link(file_id, 60).partition("?")
    expires, signature = (part.partition("=")[2] for part in query.split("&"))
    again = Store(tmp_path, MIB)
    again.check(file_id, int(expires), signature)
    assert await again.get(file_id) == PNG
    assert stat.S_IMODE((tmp_path / "links.key").stat().st_mode) == 0o600
    (tmp_path / "links.key").write_bytes(b"short")  # what a crash of another program may leave
    with pytest.raises(Refused, match="not one that the service made"):
        Store(tmp_path, MIB).check(file_id, int(expires), signature)
    assert len((tmp_path / "links.key").read_bytes()) == 32


async def test_the_oldest_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path, 1000)
    ids = [await store.put(bytes(300), "png", 3600) for _ in range(4)]
    assert store.used_bytes == 900
    assert [await store.get(file_id) is not None for file_id in ids] == [False, True, True, True]
    big = await store.put(bytes(1000), "png", 3600)
    assert [path.name for path in store.folder.iterdir()] == [big]
    with pytest.raises(InvalidRequest, match=r"has 1001 bytes; allowed here: at most 1000, .*store_mb"):
        await store.put(bytes(1001), "png", 3600)
    assert await store.get(big) is not None


async def test_the_cap_counts_what_was_there(tmp_path: Path) -> None:
    first = Store(tmp_path, 1000)
    ids = []
    for _ in range(3):
        ids.append(await first.put(bytes(300), "png", 3600))
        await asyncio.sleep(0.01)
    (first.folder / ".file_0.half").write_bytes(bytes(99))
    (first.folder / "notes.txt").write_text("somebody else's")
    store = Store(tmp_path, 1000)
    assert store.used_bytes == 900
    await store.put(bytes(300), "png", 3600)
    assert await store.get(ids[0]) is None
    assert sorted(path.name[:5] for path in store.folder.iterdir()) == ["file_", "file_", "file_", "notes"]


async def test_many_at_once_stay_within_the_cap(tmp_path: Path) -> None:
    store = Store(tmp_path, 10_000)
    ids = await asyncio.gather(*(store.put(bytes(1000 + n), "webp", 3600) for n in range(50)))
    assert len(set(ids)) == 50
    on_disk = [path.stat().st_size for path in store.folder.iterdir()]
    assert sum(on_disk) == store.used_bytes <= 10_000


async def test_purge_takes_what_is_over_its_time(store: Store) -> None:
    short, long = await store.put(PNG, "png", 10), await store.put(PNG, "png", 1000)
    assert await store.purge(time.time() + 100) == 1
    assert (await store.get(short), await store.get(long)) == (None, PNG)


FULL = """
import asyncio, resource, signal, sys
from pathlib import Path
from tdm_app.store import Store
from tdm_serve.errors import OutputError

async def main():
    store = Store(Path(sys.argv[1]), 2**20)
    kept = await store.put(bytes(1000), "png", 3600)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        await store.put(bytes(5000), "png", 3600)
    except OutputError as error:
        print(str(error).rpartition(": ")[2])
    assert store.used_bytes == 1000, store.used_bytes
    assert await store.get(kept) == bytes(1000)
    await store.put(bytes(1500), "png", 3600)
    print(len(list(store.folder.iterdir())))

asyncio.run(main())
"""


async def test_a_full_disk_leaves_nothing_half(tmp_path: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("File too large\n2\n", "")


async def test_retention(tmp_path: Path) -> None:
    state, settings = State(tmp_path), Settings(job_retention_s=100, picture_retention_s=50, feedback_retention_s=70)
    store = Store(tmp_path, MIB)
    file_id = await store.put(PNG, "png", 10**6)
    job = await state.add_job("", {"n": 1})
    await state.finish_job(job.id, {}, [file_id], {"img_1": {"prompt": "a"}})
    now = time.time()
    await forget(state, store, settings, now + 60)
    assert await state.picture("img_1") is None
    assert await store.get(file_id) == PNG
    await forget(state, store, settings, now + 101)
    assert await state.job(job.id) is None
    assert await store.get(file_id) is None
    state.close()


async def test_retention_goes_on_after_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, settings = State(tmp_path), Settings(job_retention_s=0.01)
    store = Store(tmp_path, MIB)
    job = await state.add_job("", {"n": 1})
    await state.finish_job(job.id, {})
    state._write_connection.execute("PRAGMA query_only = ON")  # writes fail, as on a disk that was remounted
    async with forgetting(state, store, settings, every_s=0.02):
        await asyncio.sleep(0.1)
        assert "cannot write" in caplog.text
        assert await state.job(job.id)
        state._write_connection.execute("PRAGMA query_only = OFF")
        await asyncio.sleep(0.2)
        assert await state.job(job.id) is None
    state.close()


async def test_feedback_is_forgotten_too(tmp_path: Path) -> None:
    connection = connect(tmp_path / "state.sqlite")
    values = ("fb", "img", "", 1.0, 100.0, json.dumps({"prompt": "a"}))
    connection.execute(
        "INSERT INTO feedback (id, image_id, owner, rating, created_s, recipe) VALUES (?,?,?,?,?,?)", values
    )
    assert (_purge_feedback(connection, 99), _purge_feedback(connection, 101)) == (0, 1)
    connection.close()
