"""Text sources, tokenizers, packed blocks and their order."""
