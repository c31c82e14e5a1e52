"""What a device executes: one protocol, one file a backend."""
