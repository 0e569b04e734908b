"""In the front end's own environment: a tiny Llama, its tokenizer, and text of which every line fills a block."""

import json
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

texts = [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
texts = [text[i : i + 400] for text in texts[:40] for i in range(0, len(text) - 400, 400)][:200]
inner = Tokenizer(models.BPE())
inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
inner.train_from_iterator(
    texts,
    trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", bos_token="<|end|>"
)
tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
tokenizer.save_pretrained("model")
shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(
    LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, bos_token_id=0, **shape)
).save_pretrained("model")
Path("text").mkdir()
Path("text/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
ids = [list(range(k, k + 32)) for k in range(200)]
rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * 32} for row in ids]
Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
