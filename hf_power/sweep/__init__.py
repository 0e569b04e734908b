"""A grid of small models, trained side by side."""
