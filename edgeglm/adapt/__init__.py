"""From pretrained towers to a teacher that knows the user's domain."""
