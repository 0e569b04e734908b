"""Metrics for the `evaluate` library, and what they count.

language_modeling.py   loss, perplexity, bits per byte and accuracy from sums over sequences; it stands alone.
token_bytes.py         `token_bytes`: how many bytes of text each token stands for.
"""
