"""Fine-tunes a language model with LoRA, together with everybody who has the ticket.

    pip install peft
    python examples/huggingface_lora.py                                 # hosts a run and prints its ticket
    DISTRO_OPTIM_RUN=psyche1... python examples/huggingface_lora.py     # joins it: the same script, anywhere

An ordinary script for transformers.Trainer; its only unusual line is SwarmTrainer. Everybody needs the same Python
version, since its standard library's sources are what it trains on.

By default the model is a tiny one of bytes, made here and never trained, so that the script needs no download and runs
in a minute without a GPU. With --model it is one of the hub's or a folder's, such as HuggingFaceTB/SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from byte_data import SourceBytes
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

from distro_optim import RunConfig, SwarmTrainer
from distro_optim.errors import DistroError

LENGTH = 128  # tokens of a sample


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH + 1,
    )
    return LlamaForCausalLM(config)


def model_and_samples(name: str | None) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    source = SourceBytes()
    if name is None:
        windows = (torch.cat([x[0], y[0, -1:]]) for x, y in (source.windows([n]) for n in range(2000)))
        return tiny_model(), [{"input_ids": tokens, "labels": tokens} for tokens in windows]
    tokenizer = AutoTokenizer.from_pretrained(name)
    samples = []
    for n in range(500):
        text = bytes(source.windows([n])[0][0].tolist()).decode("utf-8", errors="replace")
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=32, padding="max_length")
        ids = tokens["input_ids"][0]
        samples.append({"input_ids": ids, "attention_mask": tokens["attention_mask"][0], "labels": ids})
    return AutoModelForCausalLM.from_pretrained(name, torch_dtype=torch.float32), samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="of the hub, or a folder; a tiny one by default")
    parser.add_argument("--run", help="ticket of the run to join; the environment's by default")
    parser.add_argument("--steps", type=int, default=60, help="of the whole run")
    parser.add_argument("--peers", type=int, default=1, help="how many the run waits for before it begins")
    parser.add_argument("--relay", default="default", help='"none" stays on this machine and network')
    parser.add_argument("--out", type=Path, default=Path("lora"), help="folder for the adapter; one for each peer")
    args = parser.parse_args()
    model, samples = model_and_samples(args.model)
    torch.manual_seed(0)
    lora = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    lora.print_trainable_parameters()
    trainer = SwarmTrainer(
        lora,
        TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            learning_rate=1e-3,
            warmup_steps=5,
            per_device_train_batch_size=8,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=samples,
        run=args.run,
        config=RunConfig(global_batch_size=16, peers_to_start=args.peers),
        relay=args.relay,
    )
    try:
        trainer.train()
    except DistroError as error:
        print(error, file=sys.stderr)
        return 1
    trainer.save_model()
    print(f"the adapter is in {args.out}, after {trainer.state.global_step} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
