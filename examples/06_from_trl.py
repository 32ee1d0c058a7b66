"""A script around TRL's `DPOTrainer`, and what changes in it to train with FocalPO here.

    python examples/06_from_trl.py --model MODEL --data pairs.jsonl --out mine          # lorafocal
    python examples/06_from_trl.py --model MODEL --data pairs.jsonl --out mine --trl    # the script as it was

The settings stay a `DPOConfig`: what it asks for is translated, or refused by name with the way out. A YAML file of
`trl dpo` becomes one of lorafocal by `lorafocal from-trl`.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from lorafocal import FocalPOTrainer, InputError
from lorafocal.compat.trl import focalpo_config


def main(given: argparse.Namespace) -> None:
    settings = DPOConfig(
        output_dir=given.out,
        beta=0.1,
        learning_rate=given.learning_rate,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,  # 16 pairs a step: here that is one number, pairs_per_step
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    pairs = load_dataset("json", data_files=given.data, split="train")
    # State the layers: where LoraConfig leaves them open, TRL takes PEFT's choice, and lorafocal all linear layers.
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])

    if given.trl:
        trainer = DPOTrainer(model, args=settings, train_dataset=pairs, processing_class=tokenizer, peft_config=lora)
    else:
        trainer = FocalPOTrainer(
            model,
            args=focalpo_config(settings, gamma=0.05),  # objective="dpo" would train TRL's own loss
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=lora,
        )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of the base model")
    parser.add_argument("--data", required=True, help="JSON lines of prompt, chosen, rejected")
    parser.add_argument("--out", required=True, help="folder for the adapter")
    parser.add_argument("--learning-rate", type=float, default=5e-6, help="peak")
    parser.add_argument("--trl", action="store_true", help="train with TRL's DPOTrainer instead")
    try:
        main(parser.parse_args())
    except InputError as error:
        raise SystemExit(f"06_from_trl: {error}") from None
