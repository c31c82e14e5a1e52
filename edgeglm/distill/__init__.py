"""From a teacher's embeddings to a light student: no teacher runs while a student learns."""
