"""What adaptation and distillation share: one loop, its losses, its seeds and its augmented views."""
