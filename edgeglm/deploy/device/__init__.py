"""What runs on the device: the standard library alone, for it goes there before anything else does."""
