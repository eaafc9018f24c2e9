"""The composition roots: ai, validator and agent, each one asyncio process."""
