"""A model in the plain form of muP: of a stock class, which an evaluator loads like any other."""

from transformers import AutoModelForCausalLM

import hf_power

hf_power.mup_init_(AutoModelForCausalLM.from_pretrained("model"), base_width=8).save_pretrained("model")
