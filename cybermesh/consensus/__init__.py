"""Agreement on an order of opaque payloads: 2-chain HotStuff (Jolteon), its driver and its simulator."""
