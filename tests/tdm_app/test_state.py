"""The state: what is accepted survives kill -9, ends once, and a full disk or a second server is told in a sentence."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tdm_app import job_table
from tdm_app.database import MIGRATIONS, connect
from tdm_app.job_table import LOST, MAX_ATTEMPTS, Job
from tdm_app.state import DATABASE, State
from tdm_serve.errors import ConfigError, InvalidRequest, OutputError

pytestmark = pytest.mark.anyio
BODY = {"prompt": "two red circles", "n": 2, "seed": 2**63 - 1}
RECIPE = {"prompt": "ein Kreis ü", "seed": 7, "sigmas": [1.0, 0.75]}


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    state = State(tmp_path / "state")
    yield state
    state.close()


async def test_the_life_of_a_job(state: State) -> None:
    job = await state.add_job("key", BODY, 120.5)
    assert await state.job(job.id) == job == Job(job.id, "key", BODY, created_s=job.created_s, eta_ms=120.5)
    assert await state.start_job(job.id)
    assert not await state.start_job(job.id)
    running = await state.job(job.id)
    assert running is not None
    assert (running.status, running.attempts, running.ended) == ("running", 1, False)
    assert running.started_s is not None
    assert await state.finish_job(job.id, {"data": [1]}, ["a.png", "b.png"], {"img_1": RECIPE})
    done = await state.job(job.id, "key")
    assert done is not None
    assert (done.status, done.result, done.files, done.ended) == ("succeeded", {"data": [1]}, ("a.png", "b.png"), True)
    assert done.finished_s is not None
    picture = await state.picture("img_1", "key")
    assert picture is not None
    assert (picture.recipe, picture.owner) == (RECIPE, "key")


@pytest.mark.parametrize("first", ["finish", "fail", "cancel"])
@pytest.mark.parametrize("second", ["finish", "fail", "cancel"])
async def test_a_job_ends_once(state: State, first: str, second: str) -> None:
    job = await state.add_job("", BODY)

    async def end(how: str, mark: int) -> bool:
        match how:
            case "finish":
                return await state.finish_job(job.id, {"mark": mark}, [str(mark)], {f"img_{mark}": RECIPE})
            case "fail":
                return await state.fail_job(job.id, {"message": str(mark)})
            case _:
                return await state.cancel_job(job.id)

    assert await end(first, 1)
    before = await state.job(job.id)
    assert not await end(second, 2)
    assert not await state.start_job(job.id)
    assert await state.job(job.id) == before
    assert await state.picture("img_2") is None
    assert (await state.picture("img_1") is not None) == (first == "finish")


async def test_the_same_end_told_twice_is_one(state: State) -> None:
    job = await state.add_job("", BODY)
    assert await state.finish_job(job.id, {"mark": 1}, ["a.png"], {"img_1": RECIPE})
    before = await state.job(job.id)
    assert await state.finish_job(job.id, {"mark": 1}, ["a.png"], {"img_1": RECIPE})  # nobody knew of the first
    assert not await state.finish_job(job.id, {"mark": 2}, ["b.png"], {"img_2": RECIPE})
    assert await state.job(job.id) == before


async def test_ends_that_race_have_one_winner(state: State) -> None:
    for _ in range(20):
        job = await state.add_job("", BODY)
        ends = [
            state.cancel_job(job.id),
            state.finish_job(job.id, {}),
            state.fail_job(job.id, {}),
            state.cancel_job(job.id),
        ]
        random.shuffle(ends)
        assert sorted(await asyncio.gather(*ends)) == [False, False, False, True]


async def test_owners_see_their_own(state: State) -> None:
    mine, other = await state.add_job("me", BODY), await state.add_job("you", BODY)
    assert await state.job(other.id, "me") is None
    assert await state.job(other.id, "") is None
    assert await state.job(other.id) == other
    assert await state.jobs("me") == [mine]
    assert await state.jobs() == [other, mine]
    assert await state.jobs(limit=1) == [other]
    third = await state.add_job("me", BODY)
    assert await state.jobs("me", after=third.id) == [mine]
    assert await state.jobs(after=third.id) == [other, mine]
    with pytest.raises(InvalidRequest, match=f"after is '{other.id}', which is no job of yours"):
        await state.jobs("me", after=other.id)
    await state.remember({"img_1": RECIPE}, "me")
    assert await state.picture("img_1", "you") is None
    assert await state.job("job_that_never_was") is None


async def test_what_a_restart_finds(tmp_path: Path) -> None:
    state = State(tmp_path)
    jobs = [await state.add_job("", BODY | {"n": n}) for n in range(5)]
    await state.start_job(jobs[0].id)
    await state.start_job(jobs[2].id)
    await state.finish_job(jobs[2].id, {})
    await state.cancel_job(jobs[3].id)
    state.close()
    state = State(tmp_path)
    assert [job.id for job in await state.jobs_to_run()] == [jobs[0].id, jobs[1].id, jobs[4].id]
    again = await state.job(jobs[0].id)
    assert again is not None
    assert (again.status, again.started_s, again.attempts, again.body) == ("queued", None, 1, jobs[0].body)
    state.close()


async def test_a_job_that_kills_the_service_is_given_up(tmp_path: Path) -> None:
    for attempt in range(MAX_ATTEMPTS):
        state = State(tmp_path)
        if attempt == 0:
            await state.add_job("", BODY, job_id="job_deadly")
        assert [job.id for job in await state.jobs_to_run()] == ["job_deadly"]
        await state.start_job("job_deadly")
        state.close()
    state = State(tmp_path)
    assert await state.jobs_to_run() == []
    job = await state.job("job_deadly")
    assert job is not None
    assert (job.status, job.error) == ("failed", LOST)
    state.close()


async def test_purge(state: State) -> None:
    old, ended, waiting = [await state.add_job("", BODY) for _ in range(3)]
    await state.finish_job(old.id, {}, ["old.png"], {"img_old": RECIPE})
    await asyncio.sleep(0.02)
    now = time.time()
    await state.finish_job(ended.id, {}, ["new.png"], {"img_new": RECIPE})
    assert await state.purge(jobs_s=100, pictures_s=100, now_s=now + 100) == ["old.png"]
    assert [job.id for job in await state.jobs()] == [waiting.id, ended.id]
    assert (await state.picture("img_old"), (await state.picture("img_new")) is not None) == (None, True)


async def test_an_id_is_taken_once(state: State) -> None:
    await state.add_job("", BODY, job_id="job_1")
    with pytest.raises(sqlite3.IntegrityError):
        await state.add_job("", BODY, job_id="job_1")
    assert await state.add_job("", BODY, job_id="job_2")


async def test_the_loop_does_not_wait_for_a_writer(state: State) -> None:
    job = await state.add_job("", BODY)
    with sqlite3.connect(state.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        adding = asyncio.create_task(state.add_job("", BODY))
        ticks = 0
        for _ in range(20):
            await asyncio.sleep(0.005)
            assert await state.job(job.id) == job  # a reader does not wait, either
            ticks += 1
        assert not adding.done()
        other.execute("COMMIT")
    other.close()
    assert (await adding).status == "queued"
    assert ticks == 20


async def test_only_its_owner_can_read_it(state: State) -> None:
    await state.add_job("", BODY)
    assert stat.S_IMODE(state.folder.stat().st_mode) == 0o700
    for path in state.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


async def test_a_temporary_one_is_gone() -> None:
    state = State.temporary()
    await state.add_job("", BODY)
    assert state.path.exists()
    state.close()
    state.close()
    assert not state.folder.exists()


async def test_a_full_disk_is_a_sentence_and_passes(state: State) -> None:
    job = await state.add_job("", BODY)
    pages = state._write_connection.execute("PRAGMA page_count").fetchone()[0]
    state._write_connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to be full
    with pytest.raises(OutputError, match=r"^cannot write .*state\.sqlite: database or disk is full$"):
        await state.add_job("", {"prompt": "x" * 100_000})
    assert await state.job(job.id) == job
    assert await state.start_job(job.id)  # needs no new page
    state._write_connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
    assert await state.add_job("", {"prompt": "x" * 100_000})


FULL = """
import asyncio, resource, signal, sys
from pathlib import Path
from tdm_app.state import State
from tdm_serve.errors import OutputError

async def main():
    state = State(Path(sys.argv[1]))
    job = await state.add_job("", {"n": 0})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))  # no file may grow beyond this
    failures = 0
    for n in range(20):
        try:
            await state.add_job("", {"prompt": "x" * 20_000})
        except OutputError as error:
            failures += 1
            assert "cannot write" in str(error), error
        assert await state.job(job.id) == job
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await state.add_job("", {"prompt": "x" * 20_000})
    print(failures, len(await state.jobs()))
    state.close()

asyncio.run(main())
"""


async def test_files_that_cannot_grow(tmp_path: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    failures, jobs = map(int, done.stdout.split())
    assert failures > 0
    assert failures + jobs == 22  # every job is there or was refused
    check_whole(tmp_path)


HOLDER = """
import sys, time
from pathlib import Path
from tdm_app.state import State
state = State(Path(sys.argv[1]))
print("open", flush=True)
time.sleep(600)
"""


async def test_two_servers_do_not_share_a_folder(tmp_path: Path, environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(ConfigError) as caught:
            State(tmp_path)
        holder.kill()
    expected = f"{tmp_path} is in use by another server (process {holder.pid}); give each its own --state-dir"
    assert str(caught.value) == expected
    State(tmp_path).close()  # the dead hold nothing


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"^cannot write .*file/lock: Not a directory$|File exists$"):
        State(tmp_path / "file")


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match=r"is no database of tdm-serve: file is not a database; move it away"):
        State(tmp_path)
    with pytest.raises(ConfigError, match="is no database"):  # and the lock was let go
        State(tmp_path)


async def test_a_newer_schema(tmp_path: Path) -> None:
    State(tmp_path).close()
    with sqlite3.connect(tmp_path / DATABASE) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(ConfigError, match=rf"newer tdm-serve \(schema {len(MIGRATIONS) + 1}\); allowed: up to"):
        State(tmp_path)


async def test_an_old_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.34.1")
    with pytest.raises(
        ConfigError, match=r"^Python's SQLite is 3\.34\.1; the service's state needs 3\.37\.0 or newer$"
    ):
        State(tmp_path)


async def test_a_migration_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdm_app.database.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE more (x);\nCREATE nonsense;\n"))
    with pytest.raises(OutputError, match="nonsense"):
        connect(tmp_path / DATABASE)
    monkeypatch.setattr("tdm_app.database.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE more (x);\n"))
    connection = connect(tmp_path / DATABASE)
    assert connection.execute("SELECT COUNT(*) FROM more").fetchone()[0] == 0
    assert connection.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS) + 1
    connection.close()


OPENER = (
    "import sys; from pathlib import Path; from tdm_app.database import connect; connect(Path(sys.argv[1])).close()"
)


async def test_many_make_it_at_once(tmp_path: Path, environment: dict[str, str]) -> None:
    path = tmp_path / DATABASE
    openers = [
        subprocess.Popen([sys.executable, "-c", OPENER, str(path)], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    assert [(opener.communicate()[1], opener.returncode) for opener in openers] == [("", 0)] * 6


WRITER = """
import asyncio, os, sys
from pathlib import Path
from tdm_app import job_table
from tdm_app.state import State

job_table.MAX_ATTEMPTS = 10**6  # this test kills on purpose

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

async def work(state, job_id):
    await state.start_job(job_id)
    done = await state.finish_job(job_id, {"of": job_id}, [f"{job_id}.png"], {f"img_{job_id}": {"prompt": job_id}})
    say("finished" if done else "twice", job_id)

async def worker(state, name):
    while True:
        job = await state.add_job(name, {"prompt": "x" * 2000})
        say("added", job.id)
        await work(state, job.id)

async def main():
    state = State(Path(sys.argv[1]))
    unfinished = await state.jobs_to_run()
    say("open")
    await asyncio.gather(*(work(state, job.id) for job in unfinished))
    await asyncio.gather(*(worker(state, f"key{n}") for n in range(6)))

asyncio.run(main())
"""


@pytest.mark.slow
async def test_kill_9_again_and_again(tmp_path: Path, environment: dict[str, str]) -> None:
    """Whatever was told to be accepted or finished is so after the next start; nothing finishes twice."""
    random.seed(0)
    said: dict[str, set[str]] = {"added": set(), "finished": set()}
    for _ in range(25):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "open\n"
            time.sleep(random.uniform(0, 0.3))
            writer.kill()
            lines = writer.stdout.read().splitlines()
        for word, job_id in (line.split() for line in lines):
            assert word in said, (word, job_id)
            assert word == "added" or job_id not in said["finished"]
            said[word].add(job_id)
        check_whole(tmp_path)
    state = State(tmp_path)
    jobs = {job.id: job for job in await state.jobs(limit=10**6)}
    assert len(said["finished"]) > 100
    assert said["added"] <= set(jobs)
    for job in jobs.values():
        picture = await state.picture(f"img_{job.id}")
        assert (job.status == "succeeded") == (picture is not None)
        assert job.status in {"succeeded", "queued", "running"}
        assert job.id not in said["finished"] or job.files == (f"{job.id}.png",)
    state.close()


def check_whole(folder: Path) -> None:
    """SQLite's own judgement, from a copy of no connection of ours."""
    connection = sqlite3.connect(folder / DATABASE)
    result: list[Any] = connection.execute("PRAGMA integrity_check").fetchall()
    connection.close()
    assert result == [("ok",)]


async def test_acceptance_is_on_the_disk(state: State) -> None:
    levels: list[int] = []

    def level(connection: sqlite3.Connection) -> None:
        levels.append(connection.execute("PRAGMA synchronous").fetchone()[0])

    await state.write(level)
    await state.write_soon(level)
    await state.write(level)
    assert levels == [2, 1, 2]  # FULL, NORMAL, FULL
    assert job_table.new_id("job").startswith("job_")
