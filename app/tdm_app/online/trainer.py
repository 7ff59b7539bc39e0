"""Decides when a training begins, watches over it, and brings what came of it into the running engine.

One at a time. A training begins when enough new ratings of a version's pictures are there, or when an admin says so. A
stop of the server ends its process but not the training: the next start goes on from the last saved state, unless
that has happened too often. Only the database says how a training stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path

from tdm_app import feedback_table
from tdm_app.errors import NotFound
from tdm_app.online import table
from tdm_app.online.material import Material, is_trainable, material_of
from tdm_app.online.process import Folder, begin, command, last_words, stop, version_entry
from tdm_app.online.table import Training
from tdm_app.refusal import Refused, refusal
from tdm_app.service import Service
from tdm_app.sse import ended
from tdm_serve import ModelInfo
from tdm_serve.errors import (
    CheckpointError,
    ConfigError,
    EngineClosed,
    InvalidRequest,
    OutputError,
    TdmServeError,
    UnknownModel,
)
from tdm_serve.files import write_atomically
from tdm_serve.models.catalog import resolve
from tdm_serve.models.linked import linked_checkpoint
from tdm_serve.models.spec import ModelSpec

log = logging.getLogger(__name__)

PAUSE_S = 0.5  # so that a burst of clicks is counted once
MAX_ATTEMPTS = 3  # a training that the server did not survive this often is not tried again
OFF = "training from ratings is switched off here; the settings `feedback` and `online_training` switch it on"
SWITCHED_OFF = "the server was started again without `online_training`"
TOO_OFTEN = f"the server stopped {MAX_ATTEMPTS} times while this training ran, so it is not tried again"


class OnlineTraining:
    """The trainings of one service. Everything happens in its event loop; `running` is its life."""

    def __init__(self, service: Service) -> None:
        self._service, self._state, self._settings = service, service.state, service.settings
        self._folder = service.state.folder / "online"
        self._process: asyncio.subprocess.Process | None = None
        self._current: Training | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._starting = asyncio.Lock()
        self._closing = False

    @property
    def on(self) -> bool:
        return self._settings.online_training and self._settings.feedback

    @property
    def min_ratings(self) -> int:
        """New ratings after which a training begins by itself."""
        return self._settings.online_min_ratings

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Enter it before the engine starts: versions of earlier trainings are served from the first moment on."""
        await self._serve_again()
        await self._take_up()
        looking = asyncio.create_task(self._look(), name="online training")
        self._service.feedback.on_change = self._changed.set
        try:
            yield
        finally:
            self._closing = True
            await ended(looking)
            if self._process is not None:
                await stop(self._process)
            if self._watcher is not None:
                await self._watcher

    # ---- what there is

    async def trainings(self) -> list[Training]:
        """The newest first."""
        return await self._state.read(table.newest)

    async def find(self, training_id: str) -> Training:
        """Raises NotFound."""
        training = await self._state.read(table.get, training_id)
        if training is None:
            raise NotFound(f"there is no training {training_id[:100]!r}; GET /v1/training lists them")
        return training

    def progress(self, training: Training) -> tuple[int, int]:
        """Updates done and of all, as the trainer's own log has them."""
        return self._of(training).progress()

    async def material(self) -> dict[str, Material]:
        """What every trainable version could learn from; fresh is what came since its last training."""
        ratings = await self._state.read(lambda connection: list(feedback_table.everything(connection)))
        last: dict[str, float] = {}
        for training in await self.trainings():
            last.setdefault(training.model, training.created_s)
        infos = self._service.infos.values()
        return {one.id: material_of(ratings, one, last.get(one.id, 0.0)) for one in infos if is_trainable(one)}

    # ---- what can be done

    async def start(self, model: str | None = None) -> Training:
        """Trains a version further: the named one, or that with the most fresh ratings.

        Refused where it is off or another training runs; UnknownModel, and InvalidRequest where there is nothing to
        learn from.
        """
        if not self.on:
            raise Refused(refusal(403, "training_off", OFF))
        async with self._starting:
            if self._current is not None:
                sentence = f"training {self._current.id} runs; one runs at a time: wait for it, or cancel it"
                raise Refused(refusal(409, "already_running", sentence, headers={"x-should-retry": "false"}))
            material = await self.material()
            info = self._chosen(model, material)
            if not material[info.id].groups.usable:
                raise InvalidRequest(
                    f"no two pictures of one prompt by {info.id} are rated differently, so there is nothing to learn",
                    "model",
                )
            return await self._begin(info, material[info.id])

    def _chosen(self, model: str | None, material: Mapping[str, Material]) -> ModelInfo:
        infos = self._service.infos
        if model is None:
            if not material:
                raise InvalidRequest("none of the served versions is a few-step student, which can be trained", "model")
            model = max(material, key=lambda name: (material[name].fresh, material[name].groups.usable))
        if model not in infos:
            raise UnknownModel(f"model {model[:100]!r} is not served; allowed: {', '.join(map(repr, infos))}")
        if model not in material:
            raise InvalidRequest(f"model {model!r} needs guidance; only few-step students are trained", "model")
        return infos[model]

    async def cancel(self, training_id: str) -> bool:
        """Ends it; False where it has ended already. What it learned so far is dropped."""
        await self.find(training_id)
        if not await self._state.write(table.end, training_id, "cancelled"):
            return False
        if self._current is not None and self._current.id == training_id and self._process is not None:
            await stop(self._process)
        return True

    async def load(self, training_id: str) -> Training:
        """Serves what came of it as a further version, now and after a restart. Doing it twice is fine.

        Refused where nothing came of it or where it cannot be served; EngineFailed while the device hangs.
        """
        training = await self.find(training_id)
        if training.status != "succeeded":
            how = "is running" if training.status == "running" else f"has {training.status}"
            raise _cannot_load(f"training {training.id} {how}; only one that has succeeded can be loaded")
        if training.version not in self._service.infos:
            try:
                await self._serve(training)
            except (CheckpointError, ConfigError) as error:
                raise _cannot_load(f"{training.version} cannot be served: {error}") from error
            log.info("%s is served from now on: training %s of %s", training.version, training.id, training.model)
        return await self.find(training_id)

    # ---- how it goes

    def _of(self, training: Training) -> Folder:
        return Folder(self._folder / str(training.number))

    async def _begin(self, info: ModelInfo, material: Material) -> Training:
        root = re.sub(r"-online-\d+$", "", info.id)
        groups = material.groups.usable
        training = await self._state.write(table.add, info.id, root, len(material.ratings), groups)
        folder = self._of(training)
        records = "".join(json.dumps(one.record(), ensure_ascii=False) + "\n" for one in material.ratings)
        try:
            folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(folder.ratings, records.encode())
            await self._run(training)
            if (await self.find(training.id)).status != "running" and self._process is not None:
                await stop(self._process)  # it was called off before there was a process
        except (OSError, TdmServeError) as error:
            said = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            await self._end(training, "failed", f"the training could not begin: {said}")
        return await self.find(training.id)

    async def _run(self, training: Training) -> None:
        steps = len((await self._spec(training.model)).sigmas)
        arguments = command(
            self._of(training), self._settings.online_config, await self._checkpoint(training.model), steps
        )
        self._process = await begin(self._of(training), arguments, self._settings.online_threads)
        self._current = training
        self._watcher = asyncio.create_task(self._watch(training, self._process), name=training.id)
        log.info("training %s of %s began with %d ratings", training.id, training.model, training.ratings)

    async def _watch(self, training: Training, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        if self._closing:
            return  # the row says running: the next start goes on
        try:
            if code:
                await self._end(training, "failed", last_words(self._of(training), code))
            else:
                await self._make_checkpoint(training)
                await self._end(training, "succeeded")
        except TdmServeError as error:
            await self._end(training, "failed", str(error))
        except Exception:
            log.exception("training %s", training.id)
            await self._end(training, "failed", "what was trained could not be taken over; the server's log says why")
        finally:
            self._process = self._current = None
            self._changed.set()

    async def _make_checkpoint(self, training: Training) -> None:
        folder, base = self._of(training), (await self._spec(training.model)).base
        try:
            entry = version_entry(folder, training.ratings, training.model)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"the trainer left no version behind: {error!r}") from error
        name = f"online-{training.number}"
        await asyncio.to_thread(linked_checkpoint, base, folder.checkpoint, name, entry, folder.adapter)

    async def _end(self, training: Training, status: table.Status, error: str | None = None) -> None:
        """Writes down how it ended, unless it was called off before, and forgets what people said."""
        try:
            ended_now = await self._state.write(table.end, training.id, status, error)
        except OutputError as full:  # the row stays running, and the next start looks again
            log.error("training %s: %s", training.id, full)
            return
        self._of(training).forget()
        if ended_now:
            level = logging.WARNING if error else logging.INFO
            log.log(level, "training %s %s%s", training.id, status, f": {error}" if error else "")

    async def _look(self) -> None:
        """Begins a training whenever enough new ratings are there."""
        while True:
            self._changed.clear()
            if self.on and self._current is None:
                with contextlib.suppress(Refused, InvalidRequest):
                    await self._start_if_due()
            await self._changed.wait()
            await asyncio.sleep(PAUSE_S)

    async def _start_if_due(self) -> None:
        try:
            material = await self.material()
            least = self.min_ratings
            due = [name for name, one in material.items() if one.fresh >= least and one.groups.usable]
            if due:
                await self.start(max(due, key=lambda name: material[name].fresh))
        except OutputError as error:
            log.error("no training begins: %s", error)

    # ---- from one start of the server to the next

    async def _serve_again(self) -> None:
        for training in reversed(await self.trainings()):
            if training.loaded:
                try:
                    await self._serve(training)
                except (TdmServeError, OSError) as error:
                    log.error("%s is no longer served: %s", training.version, error)
                    await self._state.write(table.set_loaded, training.id, loaded=False)

    async def _take_up(self) -> None:
        for training in await self.trainings():
            if training.status != "running":
                continue
            if not self.on or training.attempts >= MAX_ATTEMPTS:
                await self._end(training, "interrupted", TOO_OFTEN if self.on else SWITCHED_OFF)
                continue
            await self._state.write(table.again, training.id)
            try:
                await self._run(training)
            except (OSError, TdmServeError) as error:
                await self._end(training, "failed", f"the training could not go on: {error}")

    async def _serve(self, training: Training) -> None:
        spec = await self._spec(training.version)
        await self._service.engine.add_version(spec)
        with contextlib.suppress(EngineClosed):
            await self._state.write(table.set_loaded, training.id, loaded=True)

    async def _checkpoint(self, model: str) -> str:
        """How the command line calls a version: by its catalogue id or folder, or by where a training put it."""
        training = await self._state.read(table.of_version, model)
        return model if training is None else str(self._of(training).checkpoint)

    async def _spec(self, model: str) -> ModelSpec:
        reference = await self._checkpoint(model)
        return replace(await asyncio.to_thread(resolve, Path(reference) if reference != model else model), id=model)


def _cannot_load(sentence: str) -> Refused:
    return Refused(refusal(409, "cannot_load", sentence, headers={"x-should-retry": "false"}))
