"""Files and folders that scripts will write to: what is refused before the work, and that nothing is made yet."""

import errno
import os
import tempfile

import pytest
from absl import app

from experiments.harness import outputs


@pytest.fixture
def not_allowed(monkeypatch):
    """Paths that may not be written: permission bits do not concern root, who may run the tests."""
    refused = set()
    access, make = os.access, tempfile.TemporaryFile

    def make_unless_refused(dir):
        if os.fspath(dir) in refused:
            raise PermissionError(f"{dir} is read-only")
        return make(dir=dir)

    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) not in refused and access(path, mode))
    monkeypatch.setattr(tempfile, "TemporaryFile", make_unless_refused)
    return refused


def test_what_can_be_written_is_taken_and_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text("{}")
    assert outputs.check_file("json", f"{tmp_path}/new.json") == tmp_path / "new.json"
    assert outputs.check_file("json", "old.json").read_text() == "{}"
    assert outputs.check_folder("output_dir", f"{tmp_path}/a/b", "x.json") == tmp_path / "a" / "b"
    outputs.check_folder("output_dir", "a/b", "old.json")
    outputs.check_folder("output_dir", ".", "old.json")
    assert os.listdir() == ["old.json"]


def test_files_that_cannot_be_written(tmp_path, not_allowed):
    file = tmp_path / "file"
    file.write_text("")
    not_allowed |= {str(file), str(tmp_path)}
    for name, message in (
        ("", "--json must not be empty"),
        (tmp_path, f"--json={tmp_path} is a folder; a file is written"),
        (tmp_path / "none" / "a.json", f"--json={tmp_path}/none/a.json: there is no folder {tmp_path}/none"),
        (file / "a.json", f"--json={file}/a.json: there is no folder {file}"),
        (file, f"--json={file} may not be written"),
        (tmp_path / "new.json", f"--json={tmp_path}/new.json may not be written"),
    ):
        with pytest.raises(app.UsageError) as raised:
            outputs.check_file("json", str(name))
        assert str(raised.value) == message


def test_folders_that_cannot_be_written(tmp_path, not_allowed):
    file, closed = tmp_path / "file", tmp_path / "closed"
    file.write_text("")
    closed.mkdir()
    not_allowed.add(str(closed))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "out" / "rows.json").mkdir(parents=True)
    for name, message in (
        ("", "--output_dir must not be empty"),
        (file, f"--output_dir={file}: {file} is not a folder"),
        (file / "a" / "b", f"--output_dir={file}/a/b: {file} is not a folder"),
        (tmp_path / "dangling" / "a", f"--output_dir={tmp_path}/dangling/a: {tmp_path}/dangling is not a folder"),
        (closed / "a", f"--output_dir={closed}/a: nothing may be written to {closed}"),
        (tmp_path / "out", f"--output_dir={tmp_path}/out/rows.json is a folder; a file is written"),
    ):
        with pytest.raises(app.UsageError) as raised:
            outputs.check_folder("output_dir", str(name), "rows.json", "plot.png")
        assert str(raised.value) == message


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    outputs.write_json("json", str(tmp_path / "a.json"), {"a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}\n'

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs.Path, "write_text", full)
    with pytest.raises(app.UsageError, match=r"--json=a\.json could not be written: No space left"):
        outputs.write_json("json", "a.json", {})
