"""Files that are whole or not there."""

from pathlib import Path

import pytest

from gpm_trl.saving import new_files, whole_files


def test_new_files_get_their_names_at_the_end_and_only_if_nothing_went_wrong(tmp_path):
    paths = [tmp_path / "a" / "first.txt", str(tmp_path / "b" / "second.txt")]
    with new_files(paths) as (first, second):
        first.write("één\n")
        second.write("two\n")
        assert not any(Path(path).exists() for path in paths)
    assert paths[0].read_text(encoding="utf-8") == "één\n"
    with pytest.raises(FileExistsError, match=r"first\.txt, .*second\.txt: already there"), new_files(paths):
        pass

    def interrupted():
        with new_files(paths, overwrite=True) as files:
            files[0].write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert paths[0].read_text(encoding="utf-8") == "één\n"
    with new_files(paths[:1], overwrite=True) as files:
        files[0].write("new")
    assert paths[0].read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "first.txt", "second.txt"]


def test_directories_are_written_into_those_there(tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "old").write_text("old")
    (tmp_path / "_saving-left").mkdir()  # by a process that was killed
    with whole_files(tmp_path) as partial:
        (Path(partial) / "templates").mkdir()
        (Path(partial) / "templates" / "new").write_text("new")
    assert sorted(path.name for path in (tmp_path / "templates").iterdir()) == ["new", "old"]
    assert [path.name for path in tmp_path.iterdir()] == ["templates"]
