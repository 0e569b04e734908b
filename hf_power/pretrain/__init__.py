"""Pretraining and annealing: the run, the Trainer, its callbacks and its guards."""
