"""An existing script for transformers' Trainer: only the import and the three degrees are ours.

OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 examples/hf_trainer.py
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from merak_like import HFTrainer as Trainer  # instead of: from transformers import Trainer

torch.manual_seed(0)
small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, max_position_embeddings=64, **small))
rows = (torch.arange(32) + torch.randint(0, 100, (512, 1))) % 100
data = [{"input_ids": row, "labels": row} for row in rows]
arguments = TrainingArguments(
    output_dir="runs/hf-trainer",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_steps=50,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    warmup_steps=5,
    weight_decay=0.1,
    logging_steps=10,
    eval_strategy="steps",
    eval_steps=25,
    save_strategy="steps",
    save_steps=25,
    load_best_model_at_end=True,
    use_cpu=not torch.cuda.is_available(),
    report_to=[],
)
trainer = Trainer(model, arguments, train_dataset=data[:448], eval_dataset=data[448:], dp=2, pp=2)
trainer.train()
trainer.save_model("runs/hf-trainer/model")
