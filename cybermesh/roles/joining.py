"""How a validator gets its state from another one's export, with the genesis as all its trust.

One that operators have added is in no committee but the newest, so no validator of an earlier epoch would talk to it; the
export leads it through every change of the committee, each proven by the quorum before it. Then its key gets the empty memory
to sign with, at the epoch that it belongs to. A key that has a memory keeps it, and the store learns from the certificates of
the chain what the key has voted for, so that an old memory shows. A key that the chain has seen and that has no memory has lost
it and must be replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cybermesh.consensus.events import SafetyRecord
from cybermesh.consensus.journal import Journal
from cybermesh.genesis import Genesis
from cybermesh.keys import SigningKey
from cybermesh.roles.backup import import_lines
from cybermesh.store.store import Store


class JoiningError(Exception):
    """This key cannot join; the text says why and what to do."""


async def join(
    store: Store,
    genesis: Genesis,
    key: tuple[SigningKey, Path],
    lines: Iterable[bytes],
    progress: Callable[[int], None] = lambda _height: None,
) -> int:
    """Fill an empty store from another validator's export, and make the memory of a new key; return the height reached.

    Args:
        store: An empty one.
        genesis: What both validators were set up with.
        key: This validator's key, and where its safety file lies or comes to lie.
        lines: The export.
        progress: Told the height from time to time.

    Raises:
        BackupError: the store is not empty, or the file is not this chain.
        JoiningError: the key is no validator's at the end of the file, or one that has lost its memory.
        JournalError: the safety file cannot be written.
        StoreError: the store refuses.
    """
    own, safety_file = key
    has_memory = safety_file.exists()
    if not has_memory and any(member.pubkey == own.public for member in genesis.validators):
        raise JoiningError(f"{safety_file}: is missing, and a key of the genesis may have signed with it; take a new key")
    replay = await import_lines(store, genesis, lines, progress, voter=own.public)
    committee = replay.committee
    if committee.index_of(own.public) is None:
        raise JoiningError(
            f"at height {replay.height} this key is no validator: have operators send validator_set, empty the store, and "
            "import an export made after that"
        )
    if has_memory:
        return replay.height
    if replay.has_signed(own.public):
        raise JoiningError("the chain shows that this key has been a validator before; its memory is lost, so take a new key")
    record = SafetyRecord.fresh(committee.genesis_cert())
    Journal.create(safety_file, chain_id=genesis.chain_id, public_key=own.public, record=record)
    return replay.height
