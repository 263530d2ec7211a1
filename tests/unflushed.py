"""Imported by a process that is forked for tests; see `tests.tiny_fixtures`."""

from __future__ import annotations

import os

os.fsync = lambda fd: None
