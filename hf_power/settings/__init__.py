"""What a pretraining run is told.

settings: `Settings`, all sections together, with a recipe's numbers taken up and every check without data; `build_model`.
sections: `ModelArguments`, `MupArguments`, `RunArguments`; `SECTIONS`, their defaults; `Tokens`, lengths such as 30M.
arguments: `ARGUMENTS`, what is done about every field of TrainingArguments, and the refusals that follow from it.
contradictions: what several arguments say together, the optimizer and the schedule among them.
new: `new_run`, settings to begin with, from templates/
target: `load_target`, the run that a sweep and a plan are for
read: `read_yaml`, `load_yaml` and `flatten`, from YAML to checked values.
"""
