"""The state machine above consensus: governance, receipts, proofs."""
