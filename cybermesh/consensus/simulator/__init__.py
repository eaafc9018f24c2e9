"""A whole committee in one thread under a virtual clock: seeded faults, local oracles, and a timeline of what went wrong."""
