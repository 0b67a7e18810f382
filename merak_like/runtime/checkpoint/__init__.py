"""Checkpoints: what training needs to go on exactly, under names that do not depend on the layout."""
