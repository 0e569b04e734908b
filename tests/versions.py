"""Runs the core of hf_power beside other versions of transformers: python tests/versions.py 4.57.6 5.6.2 ...

Each version is laid over the environment that this runs in, in a folder of its own below it, with what it needs to be of another
version too; that is quicker than an environment each. `make versions` runs those that docs/interop.md names.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HUB = ["huggingface_hub==1.33.0", "httpx==0.28.1", "httpcore==1.0.9"]
# From which version on, and what that asks for beside itself.
NEEDS = {
    (4, 56): [
        *("huggingface_hub==0.36.0", "tokenizers==0.22.2", "datasets==4.4.2", "dill==0.4.0", "multiprocess==0.70.18"),
        *("fsspec==2025.9.0", "httpx==0.28.1", "httpcore==1.0.9"),
    ],
    (5, 0): [*HUB, "tokenizers==0.22.2"],
    (5, 17): HUB,
    (5, 20): [],
}


def laid_over(version: str) -> Path:
    """The folder with this version, which is made if it is not there."""
    folder = Path(sys.prefix) / "versions" / version
    if not folder.exists():
        numbers = tuple(map(int, version.split(".")[:2]))
        needed = next(packages for since, packages in reversed(NEEDS.items()) if numbers >= since)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"transformers=={version}", *needed], check=True)
    return folder


def core() -> None:
    """The schedule, both forms of muP, the coordinate check, a fit and a plan; an AssertionError where one is wrong."""
    import json
    import tempfile

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config, Trainer, TrainingArguments

    import hf_power
    from hf_power.cli import main

    blocks = [{"input_ids": x, "labels": x} for x in torch.randint(0, 64, (400, 32))]
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}

    def rates(model, folder, mup):
        args = TrainingArguments(
            folder,
            learning_rate=0.02,
            max_steps=6,
            per_device_train_batch_size=4,
            lr_scheduler_type="power",
            lr_scheduler_kwargs={"a": 0.5, "decay_ratio": 0.0},
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        used = []

        class Told(Trainer):
            def training_step(self, *given, **kwargs):
                used.append(self.optimizer.param_groups[0]["lr"])
                return super().training_step(*given, **kwargs)

        optimizer = hf_power.mup_adamw(model, args) if mup else None
        Told(model=model, args=args, train_dataset=blocks, optimizers=(optimizer, None)).train()
        return used

    expected = [0.02, *(min(0.02, 0.5 * (128 / 4096) * (128 * k) ** -0.51) for k in range(1, 6))]
    with tempfile.TemporaryDirectory() as folder:
        plain = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
        assert torch.allclose(torch.tensor(rates(plain, folder, mup=False)), torch.tensor(expected), rtol=1e-6)
        for config in (LlamaConfig(**shape), MixtralConfig(**shape, num_local_experts=4)):
            model = hf_power.mup_init_(AutoModelForCausalLM.from_config(hf_power.mup_config(config, base_width=16)))
            groups = hf_power.mup_param_groups(model, lr=0.02)
            assert sorted({round(group["lr"] / 0.02, 6) for group in groups}) == [0.25, 1.0]
            assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        qwen = hf_power.mup_init_(AutoModelForCausalLM.from_config(Qwen3Config(**shape)), base_width=16)
        assert torch.allclose(torch.tensor(rates(qwen, folder, mup=True)), torch.tensor(expected), rtol=1e-6)
        assert hf_power.coord_check(Qwen3Config(**shape), widths=[64, 128, 192, 256], steps=2).passed
        rows = ["learning_rate,tokens_per_step,tokens,loss,seed"]
        for batch in (4096, 8192, 16384):
            for tokens in (10**7, 2 * 10**7, 4 * 10**7):
                best = 3 * (batch / 4096) ** 0.7 * tokens**-0.4
                rows += [f"{best * 2**k},{batch},{tokens},{3 + 0.03 * k**2},0" for k in (-1.6, -0.6, 0.4, 1.4)]
        (csv := Path(folder, "rows.csv")).write_text("\n".join(rows))
        assert (
            main(["fit", str(csv), "--schedule", "cosine", "--base_width", "16", "--output_dir", f"{folder}/fit"]) == 0
        )
        law = json.loads(Path(folder, "fit/fit.json").read_text())["law"]
        assert abs(law["b"] + 0.4) < 1e-3, law
        target = [
            "--tokens",
            "1B",
            "--tokens_per_step",
            "64k",
            "--parameters",
            "100M",
            "--output_dir",
            f"{folder}/plan",
        ]
        assert main(["plan", f"{folder}/fit/recipe.json", *target]) == 0
    print(f"transformers {transformers.__version__}: the core is right")


def run(versions: list[str]) -> int:
    """Run the core beside each version; 1 if one of them failed."""
    failed = []
    for version in versions:
        environment = os.environ | {"PYTHONPATH": f"{laid_over(version)}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, __file__, "--core"], env=environment, capture_output=True, text=True)
        print(done.stdout.splitlines()[-1] if done.returncode == 0 else f"{version} FAILED\n{done.stderr[-3000:]}")
        failed += [version] * bool(done.returncode)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(core() if sys.argv[1:] == ["--core"] else run(sys.argv[1:]))
