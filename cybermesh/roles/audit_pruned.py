"""The part of the audit that needs no bodies: blocks below a snapshot whose transactions were pruned.

What remains provable: each header follows from the one before it and was signed by its author, every commit has its
certificate, and the receipts are the leaves of the log whose frontier the certified snapshot holds; decisions follow from
receipts. What was executed cannot be executed again, and that the report says.
"""

from __future__ import annotations

import hashlib
from typing import Final

from cybermesh.consensus import codec
from cybermesh.consensus.certificates import CertificateVerifier
from cybermesh.consensus.committee import Committee
from cybermesh.consensus.types import BlockHash, Header, MalformedError
from cybermesh.genesis import Genesis
from cybermesh.ledger import receipts
from cybermesh.ledger.merkle import Frontier
from cybermesh.roles import records
from cybermesh.roles.audit_findings import compare, found
from cybermesh.store.records import StoredBlock, StoredDecision, StoredReceipt, StoredTransaction
from cybermesh.store.rows import Rows, StoredCertificate, key_of

PAGE_BLOCKS: Final = 256


class PrunedChain:
    """Checks heights 1 to some height without executing them."""

    def __init__(self, rows: Rows, genesis: Genesis, verifier: CertificateVerifier) -> None:
        self._rows = rows
        self._verifier = verifier
        committee = Committee.of(genesis.chain_id, (member.pubkey for member in genesis.validators))
        self._parent = committee.genesis_hash()
        self._log = Frontier()
        self._root = b""
        self._is_open = False

    async def run(self, last: int) -> tuple[Frontier, bytes, BlockHash]:
        """Check up to height ``last``; return the log's frontier, the state root and the hash of that block.

        Raises:
            FoundError: a row is not what it must be.
        """
        height = 1
        while height <= last:
            end = min(height + PAGE_BLOCKS - 1, last)
            certificates = {row.height: row for row in await self._rows.of_heights(StoredCertificate, height, end)}
            caused = await self._rows.of_heights(StoredReceipt, height, end)
            ordered = await self._rows.of_heights(StoredTransaction, height, end)
            decided = await self._rows.of_heights(StoredDecision, height, end)
            for row in await self._rows.of_heights(StoredBlock, height, end):
                if row.height != height:
                    found("blocks", {"height": height}, "removed", height, f"the next stored block is {row.height}")
                self._check_header(row)
                self._check_receipts(row, [entry for entry in caused if entry.height == height])
                self._check_transactions(height, [entry for entry in ordered if entry.height == height], caused)
                self._check_decisions(height, [entry for entry in decided if entry.height == height], caused)
                self._check_certificate(certificates.get(height))
                height += 1
            if height != end + 1:
                found("blocks", {"height": height}, "removed", height, "the chain has a gap")
        return self._log, self._root, self._parent

    def _check_header(self, row: StoredBlock) -> None:
        key = key_of(row)
        try:
            block = codec.decode_block(row.frame)
        except MalformedError as error:
            found("blocks", key, "changed", row.height, f"column frame: {error}")
        header: Header = block.header
        names = ("hash", "epoch", "round", "time_ms", "author", "state_root", "decision_seq")
        stored = [row.header, *(getattr(row, name) for name in names)]
        given = [header.encode(), *(getattr(header, name) for name in names)]
        if stored != given or header.height != row.height:
            found("blocks", key, "changed", row.height, "its columns are not those of its frame")
        if header.parent_hash != self._parent:
            found("blocks", key, "changed", row.height, "it does not follow from the block before it")
        if not self._verifier.is_valid_header_signature(header, block.signature):
            found("blocks", key, "changed", row.height, "its author has not signed it")
        self._parent, self._root, self._is_open = header.hash, header.state_root, True

    def _check_receipts(self, row: StoredBlock, caused: list[StoredReceipt]) -> None:
        if (row.first_leaf, row.receipt_count) != (self._log.size, len(caused)):
            found("receipts", {"leaf": self._log.size}, "removed", row.height, f"the block has {row.receipt_count} receipts")
        leaves = []
        for number, entry in enumerate(caused, start=row.first_leaf):
            try:
                receipt = receipts.decode(entry.body)
            except receipts.ReceiptError as error:
                found("receipts", key_of(entry), "changed", row.height, f"column body: {error}")
            if entry != records.stored_receipt(receipt, number, entry.body):
                found("receipts", key_of(entry), "changed", row.height, "its columns are not those of its body")
            leaves.append(receipt.leaf)
        self._log = self._log.append(leaves)

    @staticmethod
    def _check_transactions(height: int, ordered: list[StoredTransaction], caused: list[StoredReceipt]) -> None:
        subjects = [entry.subject for entry in caused if entry.height == height and not entry.kind.startswith("system")]
        if [entry.digest.hex() for entry in ordered] != subjects:
            found("transactions", {"height": height}, "changed", height, "they are not those that the receipts name")

    @staticmethod
    def _check_decisions(height: int, decided: list[StoredDecision], caused: list[StoredReceipt]) -> None:
        rules = {entry.decision_seq: entry.rule_data for entry in decided}
        expected = []
        for entry in caused:
            if entry.height == height:
                receipt = receipts.decode(entry.body)
                known = {effect.decision_seq: rules.get(effect.decision_seq, b"") for effect in receipt.decisions}
                expected += records.stored_decisions(receipt, entry.leaf, known)
        compare(decided, expected, height, ignored=("is_active",))
        for row in decided:
            if hashlib.sha256(row.rule_data).digest() != row.rule_hash:
                found("decisions", key_of(row), "changed", height, "column rule_data has another hash")

    def _check_certificate(self, stored: StoredCertificate | None) -> None:
        if stored is None:
            return
        try:
            certificate = codec.decode_quorum_cert(stored.body)
        except MalformedError as error:
            found("certificates", key_of(stored), "changed", stored.height, f"is no certificate: {error}")
        if certificate.parent_hash != self._parent or not certificate.proves_parent:
            found("certificates", key_of(stored), "changed", stored.height, "it does not prove the commit of this block")
        if not self._verifier.is_valid_quorum_cert(certificate):
            found("certificates", key_of(stored), "changed", stored.height, "no quorum has signed it")
        self._is_open = False
