"""Files out of published packages, by the real pip and without a network; files that come into being whole."""

import hashlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from zipfile import ZipFile

import pytest

import lit_prune
from lit_prune.atomic import built_whole, sweep, write_text
from lit_prune.errors import BadInput
from lit_prune.published import PublishedFile, cache_folder

MEMBER = "tiny_text/data/poem.txt"
POEM = "a line\nanother line\n" * 99


def build_wheel(folder: Path) -> Path:
    """A wheel with one text file in it."""
    wheel = folder / "tiny_text-1.0-py3-none-any.whl"
    info = "tiny_text-1.0.dist-info"
    with ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, POEM)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-text\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{MEMBER},,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return wheel


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel in the only place where pip looks; caches and temporary files go below `tmp_path`."""
    index, scratch = tmp_path / "index", tmp_path / "scratch"
    index.mkdir()
    scratch.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("LIT_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return build_wheel(index)


def checksum(wheel: Path) -> str:
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def left_behind(wheel: Path) -> list[Path]:
    """Everything but the wheel itself."""
    places = [wheel.parents[1] / "cache", wheel.parents[1] / "scratch"]
    return [path for place in places for path in place.rglob("*")]


def test_a_file_is_fetched_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = f"package://tiny-text==1.0/{MEMBER}?sha256={checksum(wheel)}"
    path = PublishedFile.parse(reference).fetch()
    assert path.read_text() == POEM
    assert path.name == "poem.txt"
    assert path.is_relative_to(cache_folder())
    assert [found for found in left_behind(wheel) if found.is_file()] == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()
    wheel.unlink()
    monkeypatch.setattr(subprocess, "run", None)
    assert PublishedFile.parse(reference).fetch() == path


def test_two_files_are_fetched_at_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "tiny_text-1.0.dist-info/WHEEL"
    poem, tags = (PublishedFile("tiny-text", "1.0", member, checksum(wheel)) for member in (MEMBER, other))
    assert poem.fetch(tags).read_text() == POEM
    monkeypatch.setattr(subprocess, "run", None)
    assert "Purelib" in tags.fetch().read_text()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


NOUGHT = "0" * 64


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (
            f"package://tiny-text==1.0/{MEMBER}?sha256={NOUGHT}",
            f"The package tiny-text==1.0 has not the checksum {NOUGHT}; correct the reference",
        ),
        (
            "package://tiny-text==1.0/tiny_text/other.txt?sha256={}",
            "tiny-text==1.0 holds no file 'tiny_text/other.txt'",
        ),
        ("package://tiny-text==1.0/tiny_text/data?sha256={}", "tiny-text==1.0 holds no file 'tiny_text/data'"),
        (f"package://tiny-text==2.0/{MEMBER}?sha256={{}}", "(No matching distribution found for tiny-text==2.0)"),
        (f"package://no-such==1.0/{MEMBER}?sha256={{}}", "(No matching distribution found for no-such==1.0)"),
    ],
)
def test_what_cannot_be_fetched(wheel: Path, reference: str, words: str) -> None:
    with pytest.raises(BadInput) as refusal:
        PublishedFile.parse(reference.format(checksum(wheel))).fetch()
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert left_behind(wheel) == []


def test_a_download_that_pip_lets_through_is_compared_too(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a pip whose own comparison is configured away."""
    run = subprocess.run

    def without_hashes(command: list[str], **arguments: object) -> object:
        command.remove("--require-hashes")
        requirement = Path(command[command.index("--requirement") + 1])
        requirement.write_text(requirement.read_text().split(" ")[0])
        return run(command, **arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", without_hashes)
    with pytest.raises(BadInput, match=f"has not the checksum {NOUGHT}"):
        PublishedFile.parse(f"package://tiny-text==1.0/{MEMBER}?sha256={NOUGHT}").fetch()
    assert left_behind(wheel) == []


def test_a_folder_in_a_wheel_is_no_file(wheel: Path) -> None:
    with ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_text/empty/", "")
    with pytest.raises(BadInput, match="no reference to a published file"):
        PublishedFile.parse(f"package://tiny-text==1.0/tiny_text/empty/?sha256={checksum(wheel)}")


@pytest.mark.parametrize(
    "reference",
    [
        "package://",
        "package://tiny-text",
        f"package://tiny-text/{MEMBER}?sha256={NOUGHT}",
        f"package://tiny-text==/{MEMBER}?sha256={NOUGHT}",
        f"package://==1.0/{MEMBER}?sha256={NOUGHT}",
        f"package://tiny-text==1.0?sha256={NOUGHT}",
        f"package://tiny-text==1.0/?sha256={NOUGHT}",
        f"package://tiny-text==1.0/{MEMBER}",
        f"package://tiny-text==1.0/{MEMBER}?sha256=",
        f"package://tiny-text==1.0/{MEMBER}?sha256={NOUGHT[1:]}",
        f"package://tiny-text==1.0/{MEMBER}?sha256={'x' * 64}",
        f"package://tiny-text==1.0/{MEMBER}?md5={NOUGHT}",
        f"package://tiny-text==1.0/../secret?sha256={NOUGHT}",
        f"package://tiny-text==1.0/a/../../../secret?sha256={NOUGHT}",
        f"package://..==1.0/{MEMBER}?sha256={NOUGHT}",
        f"package://tiny-text==../{MEMBER}?sha256={NOUGHT}",
        f"package://-r==1.0/{MEMBER}?sha256={NOUGHT}",
        f"package://tiny text==1.0/{MEMBER}?sha256={NOUGHT}",
        f"package://tiny-text==1.0 --index-url=x/{MEMBER}?sha256={NOUGHT}",
        f"package://[x==1.0/{MEMBER}?sha256={NOUGHT}",
        f"https://tiny-text==1.0/{MEMBER}?sha256={NOUGHT}",
        MEMBER,
    ],
)
def test_malformed_references(reference: str) -> None:
    with pytest.raises(
        BadInput, match="is no reference to a published file; write package://NAME==VERSION/PATH"
    ) as error:
        PublishedFile.parse(reference)
    assert str(error.value).startswith(f"'{reference}' ")


def test_a_path_that_begins_at_the_root_stays_in_the_cache() -> None:
    path = PublishedFile.parse(f"package://tiny-text==1.0//etc/passwd?sha256={NOUGHT}").path
    assert path.resolve().is_relative_to(cache_folder().resolve())


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("LIT_PRUNE_CACHE", "~/chosen")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/home/someone/chosen")
    monkeypatch.delenv("LIT_PRUNE_CACHE")
    assert cache_folder() == Path("/xdg/lit-prune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/someone/.cache/lit-prune")


# --- whole or not at all


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_built_whole(tmp_path: Path) -> None:
    target = tmp_path / "new/folder/file.txt"
    with built_whole(target) as draft:
        draft.write_text("first")
        assert not target.exists()
    write_text(target, "sécond\n")  # an existing file is replaced
    assert target.read_bytes() == "sécond\n".encode()
    assert tree(tmp_path) == ["new", "new/folder", "new/folder/file.txt"]


@pytest.mark.parametrize("there_before", [False, True])
def test_a_folder_built_whole(tmp_path: Path, there_before: bool) -> None:
    target = tmp_path / "model"
    if there_before:  # empty: nothing that has to be kept
        target.mkdir()
    with built_whole(target) as draft:
        draft.mkdir()
        (draft / "a").write_text("a")
    assert tree(tmp_path) == ["model", "model/a"]


def test_the_first_of_two_that_build_one_folder_wins(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with built_whole(target) as draft:
        draft.mkdir()
        (draft / "mine").touch()
        with built_whole(target) as other:
            other.mkdir()
            (other / "theirs").touch()
    assert tree(tmp_path) == ["model", "model/theirs"]


def test_a_file_never_replaces_a_folder_in_silence(tmp_path: Path) -> None:
    (tmp_path / "model/a").mkdir(parents=True)
    with pytest.raises(OSError, match="model"), built_whole(tmp_path / "model") as draft:
        draft.write_text("x")
    assert tree(tmp_path) == ["model", "model/a"]


def fail_halfway(target: Path, error: type[BaseException], folder: bool) -> None:
    with built_whole(target) as draft:
        if folder:
            draft.mkdir()
        (draft / "part" if folder else draft).write_text("half")
        raise error("half")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("folder", [False, True])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException], folder: bool) -> None:
    with pytest.raises(error):
        fail_halfway(tmp_path / "target", error, folder)
    assert tree(tmp_path) == []


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(ValueError, match="half"):
        fail_halfway(target, ValueError, folder=False)
    assert target.read_text() == "old"
    assert tree(tmp_path) == ["target"]


def test_sweep_removes_what_a_killed_process_leaves(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from lit_prune.atomic import built_whole

        target = Path(sys.argv[1])
        with built_whole(target / "file") as file, built_whole(target / "blocks" / "folder") as folder:
            file.write_text("half")
            (folder / "deep").mkdir(parents=True)
            (folder / "deep" / "part").write_text("half")
            print("ready", flush=True)
            time.sleep(60)
    """
    (tmp_path / "kept").write_text("kept")
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    root = Path(lit_prune.__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(tree(tmp_path)) > 4
    assert not (tmp_path / "file").exists()
    assert not (tmp_path / "blocks" / "folder").exists()
    sweep(tmp_path)
    assert tree(tmp_path) == ["blocks", "kept"]
    sweep(tmp_path / "nowhere")
