"""The store: made once, whole or not at all, whoever asks and whoever dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmia_exp import claims, store
from diffmia_exp.store import Store, StoreError, digest

SPEC = {"seed": 1, "model": {"channels": [8, 16]}}
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=4
)


def write(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)


def test_made_once_then_found(tmp_path: Path) -> None:
    calls = []
    s = Store(tmp_path, "models")

    def make(folder: Path) -> None:
        calls.append(folder)
        write(folder)

    first, second = s.get_or_make(SPEC, make), s.get_or_make(SPEC, make)
    assert first == second == tmp_path / "models" / s.key(SPEC)
    assert len(calls) == 1
    assert {p.name for p in first.iterdir()} == {"spec.yaml", "weights", "DONE"}
    assert {p.name for p in (tmp_path / "models").iterdir()} == {s.key(SPEC)}, "something was left behind"


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), plain_values, min_size=1, max_size=4))
def test_key_ignores_order_and_nothing_else(spec: dict) -> None:
    s = Store(Path(), "models")
    assert s.key(spec) == s.key(dict(reversed(spec.items())))
    name = next(iter(spec))
    assert s.key(spec) != s.key({**spec, name: [spec[name]]})
    assert s.key(spec) != s.key({**spec, name + "x": 0} if name + "x" not in spec else {})
    assert s.key(spec) != Store(Path(), "scores").key(spec)


def test_key_changes_with_the_code_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s = Store(tmp_path, "models")
    before = s.key(SPEC)
    monkeypatch.setattr(store, "VERSION", store.VERSION + 1)
    assert s.key(SPEC) != before


def test_digest_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError):
        digest({"lr": float("nan")})


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "no DONE", "bad DONE"])
def test_a_damaged_entry_is_set_aside_and_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    s = Store(tmp_path, "models")
    entry = s.get_or_make(SPEC, write)
    weights = entry / "weights"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[500] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "delete":
        weights.unlink()
    elif damage == "no DONE":
        (entry / "DONE").unlink()
    else:
        (entry / "DONE").write_text("{")
    assert s.get(SPEC) is None
    for n in (1, 2):
        again = s.get_or_make(SPEC, write)
        assert again == entry
        assert s.get(SPEC) == entry
        assert (entry / "weights").read_bytes() == b"w" * 1000
        aside = entry.with_name(f"{entry.name}.damaged-{n}")
        assert aside.is_dir(), "nothing is deleted"
        assert f"set aside as {aside.name}" in caplog.text
        (entry / "weights").write_bytes(b"x")


def test_an_entry_that_was_killed_just_before_it_was_renamed_is_whole(tmp_path: Path) -> None:
    s = Store(tmp_path, "models")
    entry = s.get_or_make(SPEC, write)
    os.rename(entry, entry.with_name(f"{entry.name}.partial"))
    assert s.get_or_make(SPEC, write) == entry
    assert s.get(SPEC) == entry


def test_an_error_while_making_leaves_no_entry_and_no_claim(tmp_path: Path) -> None:
    s = Store(tmp_path, "models")

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        s.get_or_make(SPEC, fail)
    assert s.get(SPEC) is None
    assert not list((tmp_path / "models").glob("*.claim"))
    found = []

    def resume(folder: Path) -> None:
        found.extend(p.name for p in folder.iterdir())
        write(folder)

    s.get_or_make(SPEC, resume)
    assert "half" in found, "the next process must find what was left, to resume from it"


def _contend(root: Path, start: float) -> None:
    def make(folder: Path) -> None:
        with open(root / "calls", "a") as f:
            f.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        write(folder)

    time.sleep(max(0.0, start - time.time()))
    Store(root, "models").get_or_make(SPEC, make)


def test_eight_processes_one_making(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = time.time() + 4
    processes = [context.Process(target=_contend, args=(tmp_path, start)) for _ in range(8)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0] * 8
    assert len((tmp_path / "calls").read_text().split()) == 1


SLEEPER = """
import sys, time, pathlib
from diffmia_exp.store import Store
def make(folder):
    (folder / "progress").write_text("half")
    print("making", flush=True)
    time.sleep(600)
Store(pathlib.Path(sys.argv[1]), "models").get_or_make({"seed": 1, "model": {"channels": [8, 16]}}, make)
"""


def killed_maker(root: Path) -> int:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    return process.pid


def test_the_claim_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    killed_maker(tmp_path)
    assert len(list((tmp_path / "models").glob("*.claim"))) == 1
    started = time.monotonic()
    left = []

    def resume(folder: Path) -> None:
        left.append((folder / "progress").read_text())
        write(folder)

    Store(tmp_path, "models").get_or_make(SPEC, resume)
    assert left == ["half"]
    assert time.monotonic() - started < 5
    assert {p.name for p in (tmp_path / "models").iterdir()} == {Store(tmp_path, "models").key(SPEC)}


def test_a_claim_from_another_machine_is_kept_while_it_beats_and_broken_when_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_maker(tmp_path)
    claim = next((tmp_path / "models").glob("*.claim"))
    owner = json.loads((claim / "owner.json").read_text()) | {"machine": "elsewhere"}
    (claim / "owner.json").write_text(json.dumps(owner))
    monkeypatch.setattr(claims, "STALE", 3.0)
    started = time.monotonic()
    Store(tmp_path, "models").get_or_make(SPEC, write)
    assert 2.5 < time.monotonic() - started < 20


def test_a_beating_claim_is_never_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "STALE", 1.0)
    monkeypatch.setattr(claims, "HEARTBEAT", 0.2)
    claim = tmp_path / "x.claim"
    with claims.claimed(claim) as held:
        assert held is not None
        owner = json.loads((claim / "owner.json").read_text()) | {"machine": "elsewhere"}
        (claim / "owner.json").write_text(json.dumps(owner))
        time.sleep(2)
        with claims.claimed(claim) as second:
            assert second is None
        held()
    assert not claim.exists()


def test_an_owner_whose_claim_was_taken_does_not_publish(tmp_path: Path) -> None:
    s = Store(tmp_path, "models")

    def make(folder: Path) -> None:
        write(folder)
        claim = next((tmp_path / "models").glob("*.claim"))
        (claim / "owner.json").write_text(json.dumps({"token": "another"}))

    with pytest.raises(StoreError, match="lost; it was taken over"):
        s.get_or_make(SPEC, make)
    assert s.get(SPEC) is None


def test_breaking_spares_a_new_owner(tmp_path: Path) -> None:
    claim = tmp_path / "x.claim"
    assert claims._take(claim, "new")
    claims._break(claim, {"token": "old"})
    assert json.loads((claim / "owner.json").read_text())["token"] == "new"
    assert not claims._take(claim, "third")


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        claims.write_atomic(path, "\ud800")
    assert [p.name for p in tmp_path.iterdir()] == ["spec.yaml"]
    assert path.read_text() == "old"
