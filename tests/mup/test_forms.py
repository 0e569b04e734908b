"""The plain form of muP against the multiplier form: the same weights, rates and losses, clipping, decay and warmup on."""

import copy

import pytest
import torch
from sentences import refused
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config, Trainer, TrainingArguments

from hf_power import MupAdamW, mup_config, mup_init_, mup_param_groups

pytestmark = pytest.mark.slow  # together

BASE, WIDTH = 16, 64
SHAPE = {"vocab_size": 48, "hidden_size": WIDTH, "intermediate_size": 160, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 32}
MODELS = {
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "untied": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "gqa": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}, tie_word_embeddings=True),
    "biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, tie_word_embeddings=False, sliding_window=None),
}


def both_forms(plain, m_emb=None):
    """Models of the two forms with the same function: their multipliers are 1, but for m_emb and that of the logits."""
    of_embeddings = m_emb or 1
    neutral = {"embedding_multiplier": of_embeddings, "residual_multiplier": 1}
    neutral["initializer_range"] = plain.initializer_range
    head = plain.hidden_size // plain.num_attention_heads
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(plain)
    stock = mup_init_(model, base_width=BASE, embedding_multiplier=m_emb)
    other = AutoModelForCausalLM.from_config(
        mup_config(plain, base_width=BASE, attention_multiplier=head**-0.5, **neutral)
    )
    weights = {
        name.replace("mlp.gate.", "block_sparse_moe.router.").replace("mlp.experts", "block_sparse_moe.experts"): tensor
        for name, tensor in copy.deepcopy(stock.state_dict()).items()
    }
    weights["model.embed_tokens.weight"] /= of_embeddings
    if plain.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        weights["model.norm.weight"] *= WIDTH / BASE * of_embeddings
    else:
        weights["lm_head.weight"] *= WIDTH / BASE
    other.load_state_dict(weights)
    return stock, other


def trained(model, folder, max_grad_norm, plain_adamw=False):
    """Losses and norms of 50 steps of a stock Trainer, accumulation on."""
    args = TrainingArguments(
        str(folder),
        learning_rate=0.02,
        lr_scheduler_type="power",
        lr_scheduler_kwargs={"a": 3.0, "decay_ratio": 0.2},
        warmup_steps=10,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        max_steps=50,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    draws = torch.randint(0, 48, (400, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in draws.clamp(max=40)]
    pair = MupAdamW.for_trainer(args)
    if plain_adamw:  # muP's groups in an optimizer of torch, which clips what it is given.
        groups = mup_param_groups(model, lr=0.02, weight_decay=0.1)
        optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(args.adam_beta1, args.adam_beta2))
        trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    else:
        trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=pair)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return [log["loss"] for log in logs], [log["grad_norm"] for log in logs]


@pytest.mark.parametrize("kind", MODELS)
def test_both_forms_give_the_same_losses_with_clipping(kind, tmp_path):
    stock, other = both_forms(MODELS[kind], m_emb={"gqa": 8.0, "biases": 8.0}.get(kind))
    losses, norms = trained(stock, tmp_path, 0.1)
    expected, expected_norms = trained(other, tmp_path, 0.1)
    assert len(losses) == 50
    assert sum(norm > 0.1 for norm in expected_norms) > 25, "the clipping has to be at work"
    assert losses == pytest.approx(expected, abs=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-3)


def test_without_the_hooks_the_clipping_is_another(tmp_path):
    """The control of the test above: the same groups, and the norm of the stored tensors."""
    stock, other = both_forms(MODELS["untied"])
    losses, _ = trained(stock, tmp_path, 0.1, plain_adamw=True)
    expected, _ = trained(other, tmp_path, 0.1)
    assert losses != pytest.approx(expected, abs=1e-4)


def test_without_clipping_groups_are_enough(tmp_path):
    stock, other = both_forms(MODELS["untied"])
    losses, _ = trained(stock, tmp_path, 0.0, plain_adamw=True)
    expected, _ = trained(other, tmp_path, 0.0)
    assert losses == pytest.approx(expected, abs=1e-5)


def test_a_second_optimizer_replaces_the_hooks_of_the_first():
    model, _ = both_forms(MODELS["untied"])
    ids = torch.arange(12)[None]
    gradients = []
    for _ in range(3):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(model.lm_head.weight.grad.clone())
        MupAdamW()(model, lr=0.1)
    assert torch.equal(gradients[1], gradients[0] / 4)
    assert torch.equal(gradients[2], gradients[1])


def test_mup_init_of_the_plain_form_is_refused_beside_mup_config():
    model = AutoModelForCausalLM.from_config(mup_config(MODELS["tied"], base_width=BASE))
    with refused(ValueError, "has been through mup_config, which has set base and multipliers"):
        mup_init_(model, base_width=BASE)


def test_four_lines_take_a_stock_script_to_mup_and_power(tmp_path):
    """The README's example."""
    args = TrainingArguments(
        str(tmp_path), learning_rate=0.02, max_steps=3, lr_scheduler_type="power", use_cpu=True, report_to=[]
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=48, num_hidden_layers=2, head_dim=16, **sizes)
    data = [{"input_ids": list(range(i, i + 16)), "labels": list(range(i, i + 16))} for i in range(16)]
    model = AutoModelForCausalLM.from_config(config)
    mup_init_(model, base_width=32)
    Trainer(model=model, args=args, train_dataset=data, optimizer_cls_and_kwargs=MupAdamW.for_trainer(args)).train()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again).__name__ == "Qwen3ForCausalLM"
    numbers = [
        [(g["name"], g["lr"], g["weight_decay"], g["eps"]) for g in mup_param_groups(m, lr=1.0)] for m in (model, again)
    ]
    assert numbers[0] == numbers[1]
