import math

import pytest
import torch
from sentences import refused
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Trainer, TrainingArguments
from transformers.models.granitemoe.modeling_granitemoe import load_balancing_loss_func

from hf_power import MupAdamW, mup_config, mup_init_
from hf_power.compat import CHECKPOINTING
from hf_power.pretrain.record import MEASURES, ExpertLoad, MeasureExperts
from hf_power.settings.settings import refuse_reentrant

EXPERTS, TOP_K = 4, 2


def config(**numbers):
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": True}
    shape |= {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "output_router_logits": True}
    return MixtralConfig(**shape | {"router_aux_loss_coef": 0.01} | numbers)


def granite(seed=0, **numbers):
    torch.manual_seed(seed)
    return mup_init_(AutoModelForCausalLM.from_config(mup_config(config(**numbers), base_width=16)))


def tokens(rows=3, length=20, seed=1):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def by_hand(model, ids):
    """The measures, token by token, from the hidden states that enter each router."""
    inputs, handles = [], []
    for layer in model.base_model.layers:
        experts = getattr(layer, "block_sparse_moe", None) or layer.mlp
        handles.append(experts.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0]))))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    share, probability, load, entropies = [0.0] * EXPERTS, [0.0] * EXPERTS, [], []
    for module, hidden in inputs:
        weight, counts = (getattr(module, "router", None) or module.gate).weight, [0] * EXPERTS
        rows = hidden.reshape(-1, hidden.shape[-1])
        for row in rows:
            p = torch.softmax(weight @ row, dim=0).tolist()
            for i in sorted(range(EXPERTS), key=lambda i: -p[i])[:TOP_K]:
                counts[i] += 1
                share[i] += 1 / (len(rows) * len(inputs))
            for i in range(EXPERTS):
                probability[i] += p[i] / (len(rows) * len(inputs))
            entropies.append(-sum(q * math.log(q) for q in p))
        load += [count / (len(rows) * TOP_K / EXPERTS) for count in counts]
    return {
        "aux_loss": EXPERTS * sum(f * p for f, p in zip(share, probability, strict=True)),
        "load_max": max(load),
        "load_min": min(load),
        "idle_experts": load.count(0),
        "router_entropy_nats": sum(entropies) / len(entropies),
    }


def measured(model, ids):
    load = ExpertLoad(model)
    load.start()
    model(input_ids=ids)
    return load.read()


@pytest.mark.parametrize("balancing", [True, False])
def test_the_measures_are_those_of_a_router_run_by_hand(balancing):
    model = granite(output_router_logits=balancing)
    found = measured(model, tokens())
    assert tuple(found) == MEASURES
    assert found == pytest.approx(by_hand(model, tokens()), rel=1e-5)
    assert found["load_max"] > 1.05  # the case is not the even one


def test_plain_mixtral_names_its_router_otherwise():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config())
    assert measured(model, tokens()) == pytest.approx(by_hand(model, tokens()), rel=1e-5)


def test_aux_loss_is_the_models_own():
    model = granite()
    outputs = model(input_ids=tokens())
    stock = load_balancing_loss_func(outputs.router_logits, EXPERTS, TOP_K)
    assert measured(model, tokens())["aux_loss"] == pytest.approx(stock.item(), rel=1e-6)
    assert outputs.aux_loss.item() == pytest.approx(stock.item(), rel=1e-6)


def test_even_and_collapsed_routers():
    model = granite()
    for layer in model.base_model.layers:
        layer.block_sparse_moe.router.weight.data.zero_()  # all experts alike: the ties go to the same ones
    found = measured(model, tokens())
    assert found["router_entropy_nats"] == pytest.approx(math.log(EXPERTS), rel=1e-6)
    assert found["load_max"] == pytest.approx(EXPERTS / TOP_K)
    assert found["load_min"] == 0
    assert found["idle_experts"] == 3 * (EXPERTS - TOP_K)
    assert found["aux_loss"] == pytest.approx(TOP_K, rel=1e-6)  # even probabilities hide the collapse


def test_only_the_pass_after_start_is_measured_and_read_once():
    model, ids = granite(), tokens()
    load = ExpertLoad(model)
    model(input_ids=tokens(seed=2))
    assert load.read() == {}
    load.start()
    model(input_ids=ids)
    model(input_ids=tokens(seed=3))
    assert load.read() == pytest.approx(by_hand(model, ids), rel=1e-5)
    assert load.read() == {}


def test_the_measurement_changes_neither_loss_nor_gradients():
    for balancing in (True, False):
        found = []
        for started in (False, True):
            model = granite(output_router_logits=balancing)
            load = ExpertLoad(model)
            if started:
                load.start()
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            found.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
        assert found[0][0] == found[1][0]
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_a_pass_once(reentrant):
    model = granite(output_router_logits=False).train()
    expected = measured(model, tokens())
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    load = ExpertLoad(model)
    load.start()
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert load.read() == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True])
def test_compiled_models_are_measured_too(regional):
    """torch.compile ignores hooks that it has not seen at first."""
    model = granite()
    expected = measured(model, tokens())
    load = ExpertLoad(model)
    for part in model.base_model.layers if regional else [model]:
        part.compile(backend="eager")
    model(input_ids=tokens())
    load.start()
    model(input_ids=tokens())
    assert load.read() == pytest.approx(expected, rel=1e-5)


def test_reentrant_checkpointing_loses_the_balancing_loss_and_is_refused():
    norms = {}
    for reentrant in (None, False, True):
        model = granite(router_aux_loss_coef=100.0).train()
        if reentrant is not None:
            getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        routers = [layer.block_sparse_moe.router.weight.grad for layer in model.base_model.layers]
        norms[reentrant] = torch.stack(routers).norm().item()
    assert norms[False] == pytest.approx(norms[None], rel=1e-6)
    assert norms[True] < norms[None] / 100
    with refused(ValueError, "use_reentrant", "balancing loss", "set use_reentrant to False"):
        refuse_reentrant(model.config, {"use_reentrant": True})
    for checkpointing in (None, {}, {"use_reentrant": False}):
        refuse_reentrant(model.config, checkpointing)
    refuse_reentrant(config(output_router_logits=False), {"use_reentrant": True})


class Logging(Trainer):
    """What a Trainer needs for the measures to reach its logs."""

    def log(self, logs, start_time=None):
        if "learning_rate" in logs:
            logs |= self.expert_load.read()
        super().log(logs, start_time)


@pytest.mark.slow
@pytest.mark.parametrize("first", [False, True])
def test_the_trainer_logs_the_measures_at_logging_steps(tmp_path, first):
    model, blocks = granite(), [{"input_ids": ids, "labels": ids} for ids in tokens(24)]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        logging_first_step=first,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=0.01,
        train_sampling_strategy="sequential",
    )
    load = ExpertLoad(model)
    trainer = Logging(model=model, args=args, train_dataset=blocks, callbacks=[MeasureExperts(load)])
    trainer.expert_load = load
    expected = by_hand(granite(), torch.stack([blocks[0]["input_ids"], blocks[1]["input_ids"]]))
    trainer.train()
    logged = {row["step"]: row for row in trainer.state.log_history if "aux_loss" in row}
    assert sorted(logged) == ([1, 2, 4] if first else [2, 4])
    assert all(set(MEASURES) <= set(row) for row in logged.values())
    if first:  # of the untrained model and the first micro-batch
        assert {name: logged[1][name] for name in MEASURES} == pytest.approx(expected, rel=1e-5)


def test_models_without_experts_and_reading_too_early():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with refused(ValueError, "LlamaForCausalLM", "GraniteMoe or Mixtral"):
        ExpertLoad(AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=16, **shape)))
    load = ExpertLoad(granite())
    load.start()
    with refused(ValueError, "forward pass", "start"):
        load.read()


def losses(implementation, steps=10):
    model = granite().train()
    if implementation is not None:
        model.set_experts_implementation(implementation)
    optimizer = MupAdamW()(model, lr=0.01, weight_decay=0.1)
    found = []
    for step in range(steps):
        loss = model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_grouped_and_batched_experts_train_as_the_loop_over_experts_does():
    eager = losses("eager")
    assert abs(eager[0] - eager[-1]) > 0.01  # the model moves
    assert losses("grouped_mm") == pytest.approx(eager, rel=1e-5)
    assert losses("batched_mm") == pytest.approx(eager, rel=1e-5)


def test_the_grouped_path_is_the_default():
    model = granite()
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    assert losses(None) == losses("grouped_mm")
