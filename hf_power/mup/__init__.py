"""muP for Llama- and Mixtral-style models: tune at a small width, keep the learning rate at every other one.

config.py   Llama -> Granite, Mixtral -> GraniteMoe with muP's multipliers: mup_config, PRESETS, scale_width
rules.py    what a width does to a tensor's init, learning rate, weight decay and eps: RULES, rule_of; and its use in
            the first weights and in AdamW's groups: mup_init_, new_model, mup_param_groups, MupAdamW
"""
