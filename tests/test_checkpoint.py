"""Checkpoints that lose nothing and hide nothing: checksums, what is done about damage, saves that fail."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cero_jax import checkpoint
from cero_jax.checkpoint import LAYOUT, Checkpoints, Cursor, Damaged, _damage_named, put_aside
from cero_jax.checksums import checksums, text_checksum
from cero_jax.run import saved_run


def mixed(word: int) -> int:
    """MurmurHash3's finaliser, in Python's integers."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
    word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)


def by_hand(array: np.ndarray) -> int:
    words = np.ascontiguousarray(array).view(f"uint{8 * min(array.dtype.itemsize, 4)}").reshape(-1)
    return sum(mixed(int(word) ^ mixed(place)) for place, word in enumerate(words)) % 2**32


RNG = np.random.default_rng(0)
ARRAYS = {
    "float32": RNG.normal(size=(3, 4, 2)).astype(np.float32),
    "odd": np.array([np.nan, -0.0, np.inf, 1e-42], np.float32),
    "bfloat16": np.asarray(jnp.asarray(RNG.normal(size=7), jnp.bfloat16)),
    "float16": RNG.normal(size=(2, 5)).astype(np.float16),
    "int8": RNG.integers(-128, 128, 9).astype(np.int8),
    "bool": RNG.random(9) < 0.5,
    "int64": RNG.integers(0, 2**62, (2, 3)),
    "float64": RNG.normal(size=()),
    "scalar": np.int32(7),
}
ARRAYS = {name: np.asarray(array) for name, array in ARRAYS.items()}


def test_a_checksum_is_the_sum_by_hand_whatever_the_dtype():
    assert checksums(ARRAYS) == {name: by_hand(array) for name, array in ARRAYS.items()}


def test_a_checksum_does_not_depend_on_how_the_array_is_sharded():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    array = RNG.normal(size=(8, 6)).astype(np.float32)
    specs = PartitionSpec(), PartitionSpec("a"), PartitionSpec(None, "b"), PartitionSpec("a", "b")
    placed = {str(spec): jax.device_put(array, NamedSharding(mesh, spec)) for spec in specs}
    assert set(checksums(placed).values()) == {by_hand(array)}


def test_every_bit_every_place_and_the_order_count():
    base, changed = RNG.normal(size=2).astype(np.float32), {}
    for bit in range(base.nbytes * 8):
        flipped = bytearray(base.tobytes())
        flipped[bit // 8] ^= 1 << bit % 8
        changed[f"bit {bit}"] = np.frombuffer(flipped, np.float32)
    changed["swapped"] = base[::-1]
    changed["zeroed"] = np.zeros_like(base)
    found = checksums(changed | {"base": base})
    assert len(set(found.values())) == len(found)
    # 0 and 1 of either place exchanged: a plain sum of the bits would not tell
    one, other = checksums({"01": np.array([0, 1], np.int32), "10": np.array([1, 0], np.int32)}).values()
    assert one != other


def test_the_checksum_of_text_survives_json():
    plain = {"b": [1, 2.5e-300, None, "é\n"], "a": {"x": float("nan"), "y": (1, 2)}}
    assert text_checksum(json.loads(json.dumps(plain))) == text_checksum(plain)
    assert text_checksum(plain | {"b": [1, 2.5e-300, None, "e\n"]}) != text_checksum(plain)


STARTED = "2026-07-06T05:04:03"


class State(NamedTuple):
    weights: jax.Array
    half: jax.Array
    key: jax.Array
    nothing: jax.Array
    counts: np.ndarray


def state_of(number: int) -> State:
    return State(
        jnp.arange(2000.0) + number, jnp.full(8, number, jnp.bfloat16), jax.random.key(number), jnp.zeros((0, 3)),
        np.arange(5) + number,
    )  # fmt: skip


def assert_is(state: State, number: int) -> None:
    want = state_of(number)
    for mine, theirs in zip(state._replace(key=jax.random.key_data(state.key)),
                            want._replace(key=jax.random.key_data(want.key)), strict=True):  # fmt: skip
        np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(scope="module")
def three_saves(tmp_path_factory):
    """Three saves, of which the last two are kept."""
    directory = tmp_path_factory.mktemp("saves") / "checkpoints"
    checkpoints, cursor = Checkpoints(directory), Cursor(config={"a": [1]}, prompts_hash="h", started=STARTED)
    for number in (1, 2, 3):
        cursor = checkpoints.save(cursor._replace(step=10 * number), state_of(number))
    checkpoints.close()
    return directory


@pytest.fixture
def saved(three_saves, tmp_path):
    return Path(shutil.copytree(three_saves, tmp_path / "checkpoints"))


def resumed(directory: Path, read_only: bool = False) -> tuple[Cursor, State]:
    checkpoints = Checkpoints(directory, read_only)
    cursor = checkpoints.cursor()
    assert cursor is not None
    found = checkpoints.restore(cursor, like=state_of(0))
    checkpoints.close()
    return found


def largest(directory: Path) -> Path:
    """The file that holds the arrays."""
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def flip_in_cursor(directory: Path) -> None:
    path = directory / "cursor/metadata"
    path.write_text(path.read_text().replace('"step": 30', '"step": 31'))


def flip_in_array(directory: Path) -> None:
    """In the chunk, compressed or not, of the largest array: behind its header, before the files' own checksums."""
    flip(largest(directory), largest(directory).stat().st_size // 2)


DAMAGES = {
    "a flip in an array": flip_in_array,
    "a digit of the cursor": flip_in_cursor,
    "a cursor that is no JSON": lambda directory: flip(directory / "cursor/metadata", 0),
    "an empty cursor": lambda directory: (directory / "cursor/metadata").write_text(""),
    "no cursor": lambda directory: shutil.rmtree(directory / "cursor"),
    "cut short": lambda directory: largest(directory).write_bytes(largest(directory).read_bytes()[:100]),
    "a file gone": lambda directory: largest(directory).unlink(),
    "no state": lambda directory: shutil.rmtree(directory / "state"),
    "nothing in it": lambda directory: (shutil.rmtree(directory), directory.mkdir()),
    "a file in its place": lambda directory: (shutil.rmtree(directory), directory.write_text("?")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_put_aside_and_the_one_before_restored(saved, capfd, damage):
    DAMAGES[damage](saved / "3")
    for read_only in (True, False):  # an evaluation, beside the run, moves nothing
        cursor, state = resumed(saved, read_only)
        assert (cursor.step, cursor.checkpoint_number) == (20, 2)
        assert_is(state, 2)
        assert (saved / "3").exists() == read_only
        said = capfd.readouterr().err.splitlines()
        done = "left where it is" if read_only else f"put aside as {saved}/put_aside/3"
        assert len(said) == 1
        assert re.fullmatch(rf"{saved}/3: a damaged checkpoint .*; {done}; checkpoint 2 takes its place", said[0])
    assert (saved / "put_aside/3").exists()
    DAMAGES["a flip in an array"](saved / "2")
    for _ in range(2):  # the last one stays where it is
        with pytest.raises(
            ValueError, match=r"/2: a damaged .*none before it .*move .*checkpoints away to begin anew$"
        ):
            resumed(saved)
    assert (saved / "2").exists()


def test_when_a_run_began_is_read_without_a_word_on_damage(saved, capfd, monkeypatch):
    closed, close = [], Checkpoints.close
    monkeypatch.setattr(Checkpoints, "close", lambda self: closed.append(1) or close(self))
    DAMAGES["a cursor that is no JSON"](saved / "3")
    assert saved_run(saved.parent).started == STARTED
    DAMAGES["a cursor that is no JSON"](saved / "2")
    assert saved_run(saved.parent) is saved_run(saved.parent / "none") is None  # what goes on from it will refuse it
    assert (capfd.readouterr().err, len(closed)) == ("", 2)
    assert {"2", "3"} <= {path.name for path in saved.iterdir()}


def test_damage_of_an_array_is_said_by_its_name(saved, capfd):
    cursor = saved / "3/cursor/metadata"
    content = json.loads(cursor.read_text())
    content["arrays"]["counts"][1] ^= 1  # as if the array had changed, and Orbax noticed nothing
    content.pop("checksum")
    cursor.write_text(json.dumps(content | {"checksum": text_checksum(content)}))
    assert_is(resumed(saved)[1], 2)
    assert "/3: a damaged checkpoint (ValueError: counts: not the bits that were saved)" in capfd.readouterr().err


def test_what_cannot_be_read_now_is_not_damage(saved, monkeypatch):
    checkpoints = Checkpoints(saved)
    cursor, restore = checkpoints.cursor(), checkpoints._manager.restore
    out_of_memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 8 GiB")
    says = lambda name: OSError(getattr(errno, name), os.strerror(getattr(errno, name)))  # noqa: E731
    of_now = (
        "EACCES EPERM EIO ESTALE ETIMEDOUT EMFILE ENFILE ENOMEM ENOTCONN EBUSY ENODEV ENXIO EHOSTDOWN EHOSTUNREACH "
        "ENETDOWN ENETUNREACH ECONNRESET ECONNREFUSED ENOBUFS EAGAIN EINTR ETXTBSY ENOLCK EREMOTEIO EDQUOT ENOKEY"
    )
    in_other_words = ValueError("Error reading local file [OS error 12: ENOMEM Cannot allocate memory]")
    for error in (*map(says, of_now.split()), ValueError("PERMISSION_DENIED: open"), MemoryError(), in_other_words,
                  out_of_memory):  # fmt: skip

        def fail(number, args, error=error):
            if "state" in args:
                raise error
            return restore(number, args=args)

        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(OSError, match="/3: a checkpoint that cannot be read now"):
            checkpoints.restore(cursor, like=state_of(0))
    assert (saved / "3").exists()
    assert_is(resumed(saved)[1], 3)
    for name in ("ENOENT", "ENOTDIR", "EISDIR", "EINVAL"):
        with pytest.raises(Damaged), _damage_named(saved / "3"):
            raise says(name)


def test_what_a_run_deletes_while_it_is_read_beside_it_is_not_damaged(saved, capfd, monkeypatch):
    beside = Checkpoints(saved, read_only=True)
    cursor, read = beside.cursor(), beside._read_cursor
    assert cursor is not None
    assert cursor.checkpoint_number == 3

    def overtaken(number):
        if number == 3:  # the run saves 4 and 5
            for newer in (4, 5):
                checkpoints = Checkpoints(saved)
                checkpoints.save(cursor._replace(step=10 * newer, checkpoint_number=newer - 1), state_of(newer))
                checkpoints.close()
        return read(number)

    monkeypatch.setattr(beside, "_read_cursor", overtaken)
    found, state = beside.restore(cursor, like=state_of(0))
    assert (found.step, found.checkpoint_number) == (50, 5)
    assert_is(state, 5)
    assert capfd.readouterr().err == ""
    for number in (4, 5):
        DAMAGES["a flip in an array"](saved / str(number))
    with pytest.raises(ValueError, match=r"/4: a damaged .*none before it .*, or let the run save another$"):
        beside.restore(found, like=state_of(0))
    beside.close()


def test_another_state_than_was_saved_is_no_damage_either(saved):
    checkpoints = Checkpoints(saved)
    cursor = checkpoints.cursor()
    assert cursor is not None
    for like, wrong in (
        (state_of(0)._replace(weights=jnp.zeros(7)), r"weights as float32\[2000\], not float32\[7\]"),
        (state_of(0)._replace(half=jnp.zeros(8)), r"half as bfloat16\[8\], not float32\[8\]"),
        (state_of(0)._replace(nothing=jnp.zeros(1)), "no nothing"),
        (state_of(0)._replace(half=jnp.zeros(0)), "half, which is not asked for"),
    ):
        with pytest.raises(ValueError, match=f"checkpoints/3 holds .*{wrong}.*: go on with the version"):
            checkpoints.restore(cursor, like=like)
    assert (saved / "3").exists()


def test_what_lies_in_the_way_is_put_aside_and_the_run_saves_on(saved, capfd):
    shutil.copytree(saved / "3", saved / "7")  # a user's copy
    (saved / "9").mkdir()
    cursor, state = resumed(saved)
    assert cursor.checkpoint_number == 3
    assert_is(state, 3)
    said = capfd.readouterr().err
    assert f"{saved}/9: a damaged checkpoint" in said
    assert f"{saved}/7: a copy of checkpoint 3; put aside" in said
    checkpoints = Checkpoints(saved)
    cursor = checkpoints.save(cursor, state_of(4))
    shutil.copytree(saved / "2", saved / "11")  # while it runs
    (saved / "5").mkdir()
    cursor = checkpoints.save(cursor, state_of(5))
    checkpoints.close()
    assert "/11: not a checkpoint of this run, put aside as" in capfd.readouterr().err
    assert sorted(path.name for path in saved.iterdir()) == ["4", "5", "put_aside"]
    assert_is(resumed(saved)[1], 5)


def test_a_save_that_does_nothing_is_an_error(saved, monkeypatch):
    checkpoints = Checkpoints(saved)
    monkeypatch.setattr(checkpoints._manager, "save", lambda *args, **kwargs: False)
    with pytest.raises(OSError, match=r"could not be saved .*Orbax did not save it"):
        checkpoints.save(Cursor(config={}, prompts_hash="", checkpoint_number=3), state_of(4))


def test_a_failed_save_is_known_at_the_next_check_and_in_one_line(saved, capfd):
    """By the system's limit on the size of a file: the writers fail as on a full disk."""
    checkpoints = Checkpoints(saved)
    cursor, large = checkpoints.cursor(), state_of(4)._replace(counts=RNG.normal(size=99_999))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1][1]))
    try:
        checkpoints.save(cursor, large)
        while checkpoints._manager.is_saving_in_progress():
            checkpoints.check()
            time.sleep(0.01)
        with pytest.raises(OSError, match=r"could not be saved .*File too large.* goes on from the checkpoint before$"):
            checkpoints.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert capfd.readouterr().err == ""
    assert_is(resumed(saved)[1], 3)


@pytest.mark.parametrize("layout", [1, 2, LAYOUT + 1])
def test_another_layout_is_refused_and_nothing_moved(saved, layout):
    path = saved / "3/cursor/metadata"
    content = json.loads(path.read_text()) | {"layout": layout}
    content.pop("checksum")
    path.write_text(json.dumps(content | ({"checksum": text_checksum(content)} if layout > LAYOUT else {})))
    with pytest.raises(ValueError, match=rf"a checkpoint of layout {layout}, .* another --work-dir$"):
        Checkpoints(saved).cursor()
    assert (saved / "3").exists()


def test_names_put_aside_are_never_taken_twice(tmp_path):
    for content in ("one", "two", "three"):
        (tmp_path / "x").write_text(content)
        put_aside(tmp_path / "x")
    found = {path.name: path.read_text() for path in (tmp_path / "put_aside").iterdir()}
    assert found == {"x": "one", "x-2": "two", "x-3": "three"}


def test_what_comes_from_a_closed_loop_is_not_printed_and_all_else_is(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    checkpoint._hush_closed_loops.__wrapped__()
    others = [SimpleNamespace(exc_value=error) for error in (RuntimeError("another"), ValueError("and this"), None)]
    for each in (*others, SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))):
        sys.unraisablehook(each)
    assert heard == others
