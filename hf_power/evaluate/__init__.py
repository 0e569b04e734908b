"""Held-out losses and downstream tasks of any causal language model."""
