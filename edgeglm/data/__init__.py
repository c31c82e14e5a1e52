"""Image-text pairs, their splits and tracks; and how raw images and text become model inputs."""
