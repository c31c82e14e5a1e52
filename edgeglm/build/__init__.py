"""The pipeline: from a recipe and a target to a bundle, stage by stage."""
