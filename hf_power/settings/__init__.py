"""What a pretraining run is told.

settings: `Settings`, all sections together, with a recipe's numbers taken up and every check without data; `build_model`.
sections: `ModelArguments`, `MupArguments`, `RunArguments`; `SECTIONS`, their defaults; `Tokens`, lengths such as 30M.
read: `read_yaml`, `load_yaml` and `flatten`, from YAML to checked values.
"""
