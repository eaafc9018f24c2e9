"""What a validator keeps: blocks, receipts, decisions and the outbox."""
