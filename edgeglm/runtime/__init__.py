"""Running a bundle on this machine."""
