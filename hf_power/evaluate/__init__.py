"""Held-out losses and downstream tasks of any causal language model.

heldout.py   `evaluate_model`: loss, perplexity, accuracy and bits per byte of packed text; `add_to_file` of eval.json.
tasks.py     `run_tasks`: tasks of lm-evaluation-harness, named by `Tasks`.
metrics/     the metric as a module for `evaluate.load`, and the bytes that tokens stand for.
"""
