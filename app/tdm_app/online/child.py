"""The trainer's process: `python -m tdm_app.online.child ARGUMENTS` is `tdm-serve ARGUMENTS`, politely.

It runs at the lowest priority, and ends when the server does, however that ends: the server holds the other end of its
standard input and never writes there. What it had saved is where the next start goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

LOWEST = 19


def main() -> int:
    """The exit code of the command."""
    with contextlib.suppress(OSError):  # it may be lower already
        os.nice(LOWEST)
    threading.Thread(target=_end_with_the_server, name="server's end", daemon=True).start()
    from tdm_serve.cli.main import main as command

    return command(sys.argv[1:])


def _end_with_the_server() -> None:
    """Python's own reading would hold a lock that its end needs, hence the bare call."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
