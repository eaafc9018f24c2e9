"""The whole mesh in one process: one ai, four validators, one agent, memory bus, embedded databases in a temporary folder."""
