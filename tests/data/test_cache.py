import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gdn2_jax.data import cache
from gdn2_jax.data.cache import exclusive, is_intact, new_entry

FOLDER = str(Path(cache.__file__).parent)
REQUEST, OTHER = "0" * 32, "1" * 32

# Takes the lock of a request, says so, and keeps it.
HOLDER = textwrap.dedent("""
    import sys, types
    from pathlib import Path
    # The module alone, which imports fast.
    sys.path.append(sys.argv[3])
    sys.modules["gdn2_jax"] = types.ModuleType("gdn2_jax")
    sys.modules["gdn2_jax"].__path__ = [str(Path(sys.argv[3]).parent)]
    from cache import exclusive, new_entry

    cache, request = Path(sys.argv[1]), sys.argv[2]
    with exclusive(cache, request), new_entry(cache / request, request) as directory:
        (directory / "file").write_text("text")
        print("ready", flush=True)
        sys.stdin.readline()
""")


@pytest.fixture
def hold(tmp_path):
    """A function that starts a process which is busy with an entry; it goes on with a line."""
    processes = []

    def start(request):
        command = [sys.executable, "-c", HOLDER, str(tmp_path), request, FOLDER]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen(command, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_full_disk_is_told_with_the_place_and_leaves_nothing(tmp_path, file_size_limit):
    with file_size_limit(0), pytest.raises(OSError, match=f"File too large: '{tmp_path}/unfin"):
        make_entry(tmp_path / "entry")
    assert not list(tmp_path.iterdir())


def make_entry(entry):
    with new_entry(entry, REQUEST) as directory:
        for name in "ab":
            (directory / name).write_text(name)


def test_any_flipped_byte_missing_or_added_file_breaks_an_entry(tmp_path):
    entry = tmp_path / "entry"
    assert not is_intact(entry)
    make_entry(entry)
    assert is_intact(entry)
    for path in (entry / "a", entry / "b"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert not is_intact(entry), path
        path.unlink()
        assert not is_intact(entry), path
        path.write_bytes(content)
        assert is_intact(entry)
    (entry / "more").write_text(json.dumps(1))
    assert not is_intact(entry)


def test_an_entry_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_entry(tmp_path / "entry", REQUEST):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_entry_that_another_process_made_first_is_kept(tmp_path):
    entry = tmp_path / "entry"
    with new_entry(entry, REQUEST) as directory:
        make_entry(entry)
        (directory / "a").write_text("later")
    assert (entry / "a").read_text() == "a"
    assert list(tmp_path.iterdir()) == [entry]


def test_the_second_process_waits_for_the_first_and_says_so(tmp_path, hold):
    first = hold(REQUEST)
    assert first.stdout.readline() == "ready\n"
    second = hold(REQUEST)
    assert "waiting for another process" in second.stderr.readline()
    with exclusive(tmp_path, OTHER):  # does not wait
        assert not (tmp_path / REQUEST).exists()
    first.communicate("\n")
    assert is_intact(tmp_path / REQUEST)
    assert second.stdout.readline() == "ready\n"


def test_what_a_killed_process_left_is_deleted_but_not_what_a_living_one_makes(tmp_path, hold):
    killed, living = hold(REQUEST), hold(OTHER)
    assert [process.stdout.readline() for process in (killed, living)] == ["ready\n"] * 2
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.glob("unfinished-*"))) == 2
    with exclusive(tmp_path, "2" * 32):
        (left,) = tmp_path.glob("unfinished-*")
    assert left.name.startswith(f"unfinished-{OTHER}")


def test_nobody_waits_where_no_lock_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with exclusive(tmp_path / "file" / "cache", REQUEST):
        pass
