"""`tdm-serve serve`: the HTTP service and its page."""

from __future__ import annotations

import argparse
from importlib import import_module

SERVER, SOURCES = "tdm_app.server", "tdm_app.settings_sources"  # by name: the SDK does not import the app


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per setting of the service, made from its class."""
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings and where each comes from, and stop"
    )
    import_module(SOURCES).add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal comes."""
    sources = import_module(SOURCES)
    settings, origins = sources.load(sources.flags_of(args))
    if args.print_config:
        print(sources.show(settings, origins))
        return 0
    return import_module(SERVER).run_server(settings)
