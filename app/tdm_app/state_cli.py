"""What `tdm-serve keys` and `tdm-serve feedback` share: they work on a service's state, whether it runs or not."""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
from collections.abc import Generator
from pathlib import Path

from tdm_app.database import EMPTY_LOG, connect, sentences, transaction
from tdm_app.settings_sources import add_flags, flags_of, load
from tdm_app.state import DATABASE
from tdm_serve.errors import ConfigError, OutputError


def add_state_arguments(parser: argparse.ArgumentParser) -> None:
    """Whose state: found as `tdm-serve serve` finds it."""
    add_flags(parser, ("state_dir", "config"))


@contextlib.contextmanager
def database(args: argparse.Namespace, create: bool = False) -> Generator[sqlite3.Connection]:
    """The service's database in one transaction. ConfigError where no service has run, unless it may be created."""
    folder: Path = load(flags_of(args))[0].state_dir
    path = folder / DATABASE
    if create:
        _make(folder)
    elif not path.exists():
        raise ConfigError(f"no service has kept its state in {folder}; name its folder with --state-dir")
    with contextlib.closing(connect(path)) as connection, sentences(path):
        with transaction(connection, durable=True):
            yield connection
        connection.execute(EMPTY_LOG).fetchall()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
