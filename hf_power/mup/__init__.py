"""muP: tune at a small width, keep the learning rate at every other one; in two forms of one rule.

rules.py      what a width does to a tensor's init, learning rate, weight decay and eps: RULES, Factors; the multiplier form's
config.py     the multiplier form: Llama -> Granite, Mixtral -> GraniteMoe with muP's multipliers: mup_config, PRESETS
scale.py      other widths of a config, whatever its family calls its sizes: scale_width
roles.py      the plain form, of any causal LM: roles from the dimensions that grow, multipliers folded into weights
probe.py      what a forward pass of two tokens shows: the final gain, how embeddings are scaled, what the first block adds
init.py       the first weights of both forms: mup_init_, new_model
optimizer.py  AdamW's groups of both forms, and clipping: mup_param_groups, MupAdamW
"""
