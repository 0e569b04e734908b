"""The model card, and the push of a run to the Hub."""
