"""A Hugging Face hub on 127.0.0.1, as far as models, adapters and data sets are read from one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

from forgetless.models import hub as names


class Hub(ThreadingHTTPServer):
    """Serves what was `put` there, and remembers what it was asked."""

    def __init__(self, place: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.place = place
        self.revisions: dict[tuple[str, str], Path] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.is_silent = False
        """It takes every question, and hangs up."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, name: str, folder: Path, *revisions: str) -> str:
        """A new state of ``models/owner/name`` or ``datasets/owner/name``; gives its commit."""
        files = sorted(file for file in folder.iterdir() if file.is_file())
        content = b"".join(file.name.encode() + file.read_bytes() for file in files)
        commit = hashlib.sha1(content).hexdigest()
        kept = self.place / commit
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        for revision in (commit, *(revisions or ["main"])):
            self.revisions[name, revision] = kept
        return commit


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = urlparse(self.path)
        self.server.asked.append(f"{self.command} {asked.path}")
        if self.server.is_silent:
            self.close_connection = True
            return
        match [unquote(part) for part in asked.path.split("/") if part]:
            case []:
                self._send(b"")
            case ["api", kind, owner, name, *rest]:
                self._tell(f"{kind}/{owner}/{name}", rest)
            case ["datasets" as kind, owner, name, "resolve", revision, *path]:
                self._give(f"{kind}/{owner}/{name}", revision, path)
            case [owner, name, "resolve", revision, *path]:
                self._give(f"models/{owner}/{name}", revision, path)
            case _:
                self._refuse("EntryNotFound")

    def _tell(self, name: str, rest: list[str]) -> None:
        if not any(known == name for known, _ in self.server.revisions):
            return self._refuse("RepoNotFound", HTTPStatus.UNAUTHORIZED)
        folder = self.server.revisions.get((name, rest[1] if rest else "main"))
        if folder is None:
            return self._refuse("RevisionNotFound")
        files = [
            {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": folder.name}
            for f in folder.iterdir()
        ]
        if rest[:1] == ["tree"]:
            return self._refuse("EntryNotFound") if rest[2:] else self._json(files)
        siblings = [{"rfilename": file["path"]} for file in files]
        found = {"id": name.partition("/")[2], "sha": folder.name, "siblings": siblings}
        return self._json({**found, "private": False, "gated": False, "tags": []})

    def _give(self, name: str, revision: str, path: list[str]) -> None:
        if not any(known == name for known, _ in self.server.revisions):
            return self._refuse("RepoNotFound", HTTPStatus.UNAUTHORIZED)
        if name in self.server.gated:
            return self._refuse("GatedRepo", HTTPStatus.FORBIDDEN)
        folder = self.server.revisions.get((name, revision))
        if folder is None:
            return self._refuse("RevisionNotFound")
        file = folder.joinpath(*path)
        if not file.is_file():
            return self._refuse("EntryNotFound", commit=folder.name)
        content = file.read_bytes()
        tag = hashlib.sha1(content).hexdigest()
        return self._send(content, {"ETag": f'"{tag}"', "X-Repo-Commit": folder.name})

    def _json(self, content: Any) -> None:
        self._send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(
        self, code: str, status: HTTPStatus = HTTPStatus.NOT_FOUND, commit: str = ""
    ) -> None:
        self._send(b"{}", {"X-Error-Code": code, "X-Repo-Commit": commit}, status)

    def _send(
        self, body: bytes, headers: dict[str, str] | None = None, status: int = HTTPStatus.OK
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with nothing on it, and an empty local cache."""
    from datasets import config
    from huggingface_hub import constants, hf_api

    with Hub(tmp_path / "hub") as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
        for owner, changes in (
            (constants, {"ENDPOINT": server.address, "HUGGINGFACE_CO_URL_TEMPLATE": template}),
            (constants, {"HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache")}),
            (constants, {"HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_PROGRESS_BARS": True}),
            (hf_api.api, {"endpoint": server.address}),
            (config, {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": False}),
            (config, {"HF_DATASETS_CACHE": tmp_path / "data"}),
        ):
            for name, value in changes.items():
                monkeypatch.setattr(owner, name, value)
        ask_again()
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
        ask_again()


def ask_again() -> None:
    """What a new process does."""
    names.commit_of.cache_clear()
    names.go_offline_if_unreachable.cache_clear()
