"""NeMo Automodel under the Power schedule: recipe: power_recipe.Recipe, with this file's folder in PYTHONPATH."""

from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

import hf_power


class Power(hf_power.PowerLR):
    """Automodel says how many steps were made; torch would take that number for the step itself."""

    def step(self, increment=None):
        for _ in range(1 if increment is None else increment):
            super().step()


class PowerConfig:
    lr_decay_style = "power"

    def build(self, optimizers, step_scheduler):
        # Tokens of a step: global_batch_size times the length of a block.
        return [Power(each, 2, step_scheduler.max_steps, tokens_per_step=192, decay_ratio=0.4) for each in optimizers]


class Recipe(TrainFinetuneRecipeForNextTokenPrediction):
    def setup(self):
        self.cfg.lr_scheduler = PowerConfig()
        super().setup()
