"""Matrices in one safetensors file, whose header says what they are and holds the rest as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from forgetless.core.errors import UserError
from forgetless.core.files import new_file
from forgetless.core.tensors import require_intact, write_tensors


@dataclass(frozen=True)
class FileFormat:
    """A kind of such files.

    Attributes:
        holds: what is in them, as messages call it; it names the file in a folder.
        version: of the header.
        make: how to make one, for whoever has none.
    """

    holds: str
    version: int
    make: str

    def file(self, path: str | Path) -> Path:
        """The file at `path`, which may be its folder."""
        path = Path(path)
        return path if path.suffix == ".safetensors" else path / f"{self.holds}.safetensors"

    def write(self, path: str | Path, matrices: Mapping[str, Tensor], **content: str) -> Path:
        """Write the file, its folder too if need be; an older one is replaced in one step.

        Args:
            path: see `file`.
            matrices: by name.
            content: further text for the header.

        Returns:
            The file.
        """
        file = self.file(path)
        header = {"format": f"forgetless-{self.holds}", "version": str(self.version), **content}
        with new_file(file) as unfinished:
            write_tensors(matrices, unfinished, header)
        return file

    def header(self, path: str | Path) -> tuple[dict[str, str], list[str]]:
        """The header of a file that `write` wrote, and the names of its matrices.

        Raises:
            UserError: there is no such file, it is damaged, or it holds something else.
        """
        file = self.file(path)
        if not file.is_file():
            raise UserError(f"no {self.holds} at {file}; make them with {self.make}")
        try:
            with safe_open(file, framework="pt") as opened:
                header, names = opened.metadata() or {}, list(opened.keys())
        except SafetensorError as problem:
            raise UserError(f"{file} is damaged or no safetensors file: {problem}") from None
        require_intact(file)
        found = header.get("format"), header.get("version")
        if found != (f"forgetless-{self.holds}", str(self.version)):
            raise UserError(f"{file} does not hold {self.holds} of version {self.version}")
        return header, names
