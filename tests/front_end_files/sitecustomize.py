"""Python imports this at the start of every process, as it does hf_power's, which hides this one and then runs it."""

import os
import sys
from importlib.abc import MetaPathFinder


class Record(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch.optim.lr_scheduler":
            sys.meta_path.remove(self)
            from torch.optim.optimizer import register_optimizer_step_pre_hook

            register_optimizer_step_pre_hook(record)


def record(optimizer, args, kwargs):
    with open(os.environ["RATES"], "a") as file:
        file.write(f"{float(optimizer.param_groups[0]['lr'])!r}\n")


sys.meta_path.insert(0, Record())
