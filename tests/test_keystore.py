from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cybermesh.envelope import Code, EnvelopeError
from cybermesh.envelope.nonces import Nonce, NonceSource
from cybermesh.keys import SigningKey
from cybermesh.keystore import FileCounters, KeystoreError, generate_key, load_key, save_key


def test_a_saved_key_loads_again_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    key = generate_key()
    save_key(tmp_path / "ai.key", key)
    assert stat.S_IMODE((tmp_path / "ai.key").stat().st_mode) == 0o600
    assert load_key(tmp_path / "ai.key").public == key.public
    assert [path.name for path in tmp_path.iterdir()] == ["ai.key"]


def test_two_generated_keys_differ() -> None:
    assert generate_key().public != generate_key().public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o601])
def test_a_key_open_to_others_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "ai.key"
    save_key(path, generate_key())
    path.chmod(mode)
    with pytest.raises(KeystoreError, match=rf"mode {mode:04o}.*chmod 600 {path}"):
        load_key(path)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "ai.key"
    first = generate_key()
    save_key(path, first)
    with pytest.raises(KeystoreError, match="exists already"):
        save_key(path, generate_key())
    assert load_key(path).public == first.public
    assert [entry.name for entry in tmp_path.iterdir()] == ["ai.key"]


def test_a_missing_key_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(KeystoreError, match="cybermesh keys generate"):
        load_key(tmp_path / "absent.key")


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeystoreError, match="absent"):
        save_key(tmp_path / "absent" / "ai.key", generate_key())


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"0" * 63, b"0" * 66, b"-----BEGIN PRIVATE KEY-----"])
def test_what_is_not_a_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ai.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeystoreError, match="not a private key"):
        load_key(path)


def test_white_space_around_the_digits_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "ai.key"
    path.write_text("  " + "0a" * 32 + "\r\n")
    path.chmod(0o600)
    assert load_key(path).public == SigningKey(b"\x0a" * 32).public


def nonces(path: Path, count: int, batch: int = 4) -> list[Nonce]:
    with FileCounters(path) as counters:
        source = NonceSource(counters, batch)
        return [Nonce.parse(source.next(1_700_000_000_000)) for _ in range(count)]


def test_counters_never_repeat_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "nonces"
    made = [nonce for count in (1, 6, 4, 9) for nonce in nonces(path, count)]
    assert len({nonce.instance for nonce in made}) == 1
    counters = [nonce.counter for nonce in made]
    assert counters == sorted(set(counters))


def test_every_possible_torn_write_skips_counters_and_repeats_none(tmp_path: Path) -> None:
    path = tmp_path / "nonces"
    used = {nonce.counter for nonce in nonces(path, 10)}
    content = path.read_bytes()
    for length in range(len(content) - 10, len(content)):
        # The last reservation was being written when the power went, so no counter from 8 on had been handed out.
        path.write_bytes(content[:length])
        again = {nonce.counter for nonce in nonces(path, 10)}
        assert not again & {counter for counter in used if counter < 8}


def test_a_lost_counter_file_gets_a_new_instance(tmp_path: Path) -> None:
    path = tmp_path / "nonces"
    (before,) = nonces(path, 1)
    path.unlink()
    (after,) = nonces(path, 1)
    assert before.instance != after.instance


def test_a_second_process_cannot_use_the_same_counters(tmp_path: Path) -> None:
    with FileCounters(tmp_path / "nonces"), pytest.raises(KeystoreError, match="in use by another process"):
        FileCounters(tmp_path / "nonces")
    FileCounters(tmp_path / "nonces").close()


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nonces").write_text("not counters at all\n\n\n")
    with pytest.raises(KeystoreError, match="not a nonce counter file"):
        FileCounters(tmp_path / "nonces")


def test_a_file_that_cannot_be_opened_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(KeystoreError, match="cannot use the nonce counters"):
        FileCounters(tmp_path)


def test_the_last_counter_is_used_and_then_no_more(tmp_path: Path) -> None:
    path = tmp_path / "nonces"
    path.write_bytes(b"%010d\n%010d\n" % (7, 2**32 - 2))
    with FileCounters(path) as counters:
        source = NonceSource(counters)
        assert [Nonce.parse(source.next(0)).counter for _ in range(2)] == [2**32 - 2, 2**32 - 1]
        for _ in range(2):
            with pytest.raises(EnvelopeError) as refused:
                source.next(0)
            assert refused.value.code is Code.NONCES_EXHAUSTED


def test_a_reservation_that_cannot_be_written_is_not_handed_out(tmp_path: Path) -> None:
    path = tmp_path / "nonces"
    counters = FileCounters(path)
    first = counters.reserve(5)
    os.close(counters._descriptor)
    counters._descriptor = os.open(path, os.O_RDONLY)
    with pytest.raises(KeystoreError, match="cannot reserve"):
        counters.reserve(5)
    counters.close()
    with FileCounters(path) as again:
        assert not set(again.reserve(5)) & set(first)
