"""Imported by a process that is forked for tests; see `tests.tiny_fixtures`."""

from __future__ import annotations

import gc
import os

gc.set_threshold(50_000, 10, 10)  # as in tests/conftest.py
os.fsync = lambda fd: None
