"""As a program: execute the blocks of a store or an export and print height, root, bytes and digest of the receipts of each."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path

from cybermesh import genesis
from cybermesh.roles.backup import BackupBlock, Replay, export_lines, read_backup
from cybermesh.store.store import open_store


async def read(source: str, chain: genesis.Genesis) -> list[bytes]:
    async with open_store(source if "://" in source else Path(source)) as store:
        return [line async for line in export_lines(store, chain)]


def main(genesis_file: str, source: str) -> None:
    chain = genesis.parse(Path(genesis_file).read_bytes())
    is_export = source.endswith("export")
    lines = Path(source).read_bytes().splitlines(keepends=True) if is_export else asyncio.run(read(source, chain))
    replay = Replay(chain)
    for entry in read_backup(lines, chain):
        if isinstance(entry, BackupBlock):
            receipts = b"".join(receipt.encode() for receipt in replay.execute(entry).receipts)
            replay.take_commit()
            print(replay.height, replay.state.root.hex(), len(receipts), hashlib.sha256(receipts).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
