"""Imported last by a process that is forked for tests; see `tests.tiny_fixtures`."""

from __future__ import annotations

import gc
import os

from sqlalchemy.orm import configure_mappers

configure_mappers()  # half a second for each that uses a database
os.fsync = lambda fd: None  # as in tests/conftest.py
gc.set_threshold(50_000, 10, 10)  # likewise
gc.collect()
gc.freeze()
