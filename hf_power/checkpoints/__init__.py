"""Checkpoints that can be trusted: sealed, verified, the newest intact one found."""
