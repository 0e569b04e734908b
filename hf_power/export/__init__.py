"""Granite and GraniteMoe as plain Llama and Mixtral, and back, with a proof."""
