"""Trains the model that Tandem ships: a small Qwen3 and its tokenizer, on the text in training/data.

Usage: python -m training.train_embedded_model OUT_DIR [--steps N] [--width W] [--dropout P] [--vocab V]

Writes a Hugging Face folder (config.json, generation_config.json, tokenizer.json, tokenizer_config.json,
model.safetensors in bfloat16) and result.json with the losses of the stored weights. The last tenth of the text is
held out from the weights and the tokenizer; of the checkpoints, the one with the lowest held-out loss is kept.
The default options are those of the model that is shipped.
"""

import argparse
import copy
import datetime
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEXT_PATH = Path(__file__).parent / "data" / "tinyshakespeare.txt"
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 1024
WINDOW = 512
BATCH = 32
HELD_OUT_SHARE = 0.1
SPEECHES_PER_SCENE = 24


def read_scenes() -> tuple[str, str]:
    """The text for training and the held-out text. The text has no marks between scenes, so an end-of-text token
    stands after every SPEECHES_PER_SCENE speeches, which teaches the model to end.
    """
    text = TEXT_PATH.read_text()
    cut = text.rindex("\n\n", 0, int(len(text) * (1 - HELD_OUT_SHARE)))
    return mark_ends(text[:cut]), mark_ends(text[cut:].strip("\n"))


def mark_ends(text: str) -> str:
    speeches = text.split("\n\n")
    scenes = [speeches[i : i + SPEECHES_PER_SCENE] for i in range(0, len(speeches), SPEECHES_PER_SCENE)]
    return END_OF_TEXT.join("\n\n".join(scene) for scene in scenes) + END_OF_TEXT


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END_OF_TEXT), trainer)
    return tokenizer


def build_model(vocab_size: int, width: int) -> Qwen3ForCausalLM:
    """A model with random weights. As in the small Qwen3s, head_dim times the number of heads is not the width."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=48,
        max_position_embeddings=2 * CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        architectures=["Qwen3ForCausalLM"],
    )
    return Qwen3ForCausalLM(config)


def add_dropout(model: Qwen3ForCausalLM, rate: float) -> None:
    """Adds dropout to what each block adds to the residual stream. The stored model has none of it."""
    for layer in model.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.register_forward_hook(lambda module, _, out: nn.functional.dropout(out, rate, module.training))


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, window: int) -> float:
    """Mean negative log-likelihood in nats a token over consecutive windows."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        piece = ids[start : start + window + 1]
        logits = model(piece[None, :-1]).logits[0].float()
        total += nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
        count += len(piece) - 1
    model.train()
    return total / count


def train(model: Qwen3ForCausalLM, ids: torch.Tensor, held_out: torch.Tensor, steps: int) -> tuple[dict, list]:
    """Trains the model. Returns the best weights and the history of losses."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    warmup = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    best, best_weights, history = math.inf, copy.deepcopy(model.state_dict()), []
    for step in range(steps):
        # Mostly short windows; some over the whole context, so that long positions are learnt too.
        window, batch = (CONTEXT, BATCH // 2) if step % 4 == 0 else (WINDOW, BATCH)
        starts = torch.randint(0, len(ids) - window - 1, (batch,)).tolist()
        pieces = torch.stack([ids[start : start + window + 1] for start in starts])
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            logits = model(pieces[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            now = held_out_loss(model, held_out, WINDOW)
            history.append({"step": step + 1, "train_loss": round(loss.item(), 4), "held_out_loss": round(now, 4)})
            print(history[-1], flush=True)
            if now < best:
                best, best_weights = now, copy.deepcopy(model.state_dict())
    return best_weights, history


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    model.to("cpu", torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=0, do_sample=True, temperature=0.8, top_k=50, top_p=0.95)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, model_max_length=2 * CONTEXT
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--vocab", type=int, default=1024)
    options = parser.parse_args()
    started = time.monotonic()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text, held_out_text = read_scenes()
    tokenizer = train_tokenizer(text, options.vocab)
    ids = torch.tensor(tokenizer.encode(text).ids, device=device)
    held_out = torch.tensor(tokenizer.encode(held_out_text).ids, device=device)
    model = build_model(tokenizer.get_vocab_size(), options.width).to(device)
    add_dropout(model, options.dropout)
    weights, history = train(model, ids, held_out, options.steps)
    model.load_state_dict(weights)
    save(model, tokenizer, options.out)
    stored = Qwen3ForCausalLM.from_pretrained(options.out, dtype=torch.float32).to(device)
    loss = held_out_loss(stored, held_out, WINDOW)
    bytes_per_token = len(held_out_text.encode()) / len(held_out)
    result = {
        "held_out_loss_nats_per_token": round(loss, 4),
        "held_out_bits_per_byte": round(loss / math.log(2) / bytes_per_token, 4),
        "held_out_loss_at_full_context": round(held_out_loss(stored, held_out, 2 * CONTEXT), 4),
        "num_parameters": stored.num_parameters(),
        "num_training_tokens": len(ids),
        "num_held_out_tokens": len(held_out),
        "options": {key: str(value) for key, value in vars(options).items() if key != "out"},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.monotonic() - started, 1),
        "history": history,
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    prompt = torch.tensor([tokenizer.encode("ROMEO:\n").ids], device=device)
    sample = stored.generate(prompt, max_new_tokens=120, do_sample=True, temperature=0.8, top_k=50, top_p=0.95)
    print(tokenizer.decode(sample[0].tolist()))
    print({key: value for key, value in result.items() if key != "history"})


if __name__ == "__main__":
    main()
