"""Trains the model that Tandem ships: a small Qwen3 and its tokenizer, on the text in training/data.

Usage: python -m training.train_embedded_model OUT_DIR [--steps N] [--width W] [--dropout P] [--vocab V]

Half of each batch is plain text, the other half conversations in Qwen3's chat format (training/corpus.py).
Writes a Hugging Face folder (config.json, generation_config.json, tokenizer.json, tokenizer_config.json,
model.safetensors in bfloat16) and result.json with the losses of the stored weights. The last tenth of the text is
held out from the weights and the tokenizer; of the checkpoints, the one with the lowest sum of both held-out losses is
kept. The default options are those of the model that is shipped.
"""

import argparse
import copy
import datetime
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from training.corpus import END_OF_TEXT, Conversation, make_conversations, mark_ends, read_plays

TEMPLATE_PATH = Path(__file__).parent / "chat_template.jinja"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]
PLAIN_ADDED_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
"""Added tokens that a decoded text shows, as with Qwen3. No training text has them."""
CONTEXT = 2048
WINDOW = 512
TOKENS_PER_STEP = 32 * WINDOW
NUM_PASSES = 4
"""How often the conversations for training go through the text, each time divided in other ways."""
EVALUATED_AT_ONCE = 32


def train_tokenizer(plays: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE. As with Qwen3, the added tokens have the last ids, and vocab_size counts them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(PLAIN_ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(mark_ends(plays).split(END_OF_TEXT), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        chat_template=TEMPLATE_PATH.read_text(),
    )


@dataclass(frozen=True)
class Texts:
    """What a model is trained on, or measured on, as token ids."""

    plain: torch.Tensor
    """The plays: (tokens,)"""
    chat: torch.Tensor
    """The conversations one after the other, with an end-of-text token after each: (tokens,)"""
    starts: torch.Tensor
    """Where each conversation starts in `chat`: (conversations,)"""
    is_reply: torch.Tensor
    """Which tokens of `chat` the assistant has to say, with the end of its turn: (tokens,)"""


def encode(plays: str, num_passes: int, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> Texts:
    """The plays in both forms. num_passes says how often the conversations go through them."""
    ids: list[int] = []
    starts: list[int] = []
    is_reply: list[bool] = []
    for conversation in make_conversations(plays, num_passes):
        starts.append(len(ids))
        for piece, is_said in conversation_pieces(conversation, tokenizer):
            piece_ids = tokenizer.encode(piece)
            ids += piece_ids
            is_reply += [is_said] * len(piece_ids)
    return Texts(
        torch.tensor(tokenizer.encode(mark_ends(plays), verbose=False), device=device),
        torch.tensor(ids, device=device),
        torch.tensor(starts, device=device),
        torch.tensor(is_reply, device=device),
    )


def conversation_pieces(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, bool]]:
    """The text of a conversation in pieces, each with whether the assistant has to say it. A cut is before or
    after an answer, where no token of the whole reaches across.
    """
    pieces, done = [], ""
    for index, message in enumerate(conversation):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(conversation[:index], tokenize=False, add_generation_prompt=True)
            reply = message["content"] + TURN_END
            pieces += [(prompt.removeprefix(done), False), (reply, True)]
            done = prompt + reply
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    return [*pieces, (whole.removeprefix(done) + END_OF_TEXT, False)]


def build_model(tokenizer: PreTrainedTokenizerFast, width: int) -> Qwen3ForCausalLM:
    """A model with random weights. As in the small Qwen3s, head_dim times the number of heads is not the width."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        architectures=["Qwen3ForCausalLM"],
    )
    return Qwen3ForCausalLM(config)


def add_dropout(model: Qwen3ForCausalLM, rate: float) -> None:
    """Adds dropout to what each block adds to the residual stream. The stored model has none of it."""
    for layer in model.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.register_forward_hook(lambda module, _, out: nn.functional.dropout(out, rate, module.training))


def token_losses(model: Qwen3ForCausalLM, pieces: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood in nats of each token but the first of each piece: (pieces, tokens - 1)."""
    logits, targets = model(pieces[:, :-1]).logits.float(), pieces[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


@torch.no_grad()
def plain_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, window: int) -> float:
    """Mean loss in nats a token over consecutive windows of plain text."""
    model.eval()
    whole = (len(ids) - 1) // window
    windows = ids[: whole * window + 1].unfold(0, window + 1, window)
    losses = [token_losses(model, batch).flatten() for batch in windows.split(EVALUATED_AT_ONCE)]
    if len(rest := ids[whole * window :]) > 1:
        losses.append(token_losses(model, rest[None]).flatten())
    model.train()
    return torch.cat(losses).mean().item()


@torch.no_grad()
def reply_loss(model: Qwen3ForCausalLM, texts: Texts) -> float:
    """Mean loss in nats a token over what the assistant has to say. Each conversation stands alone."""
    model.eval()
    ends = [*texts.starts.tolist()[1:], len(texts.chat)]
    spans = sorted(zip(texts.starts.tolist(), ends, strict=True), key=lambda span: span[1] - span[0])
    total, count = 0.0, 0
    for first in range(0, len(spans), EVALUATED_AT_ONCE):
        batch = spans[first : first + EVALUATED_AT_ONCE]
        # What follows a conversation that is shorter than the batch's longest can't change what comes before it.
        index = torch.tensor([start for start, _ in batch], device=texts.chat.device)[:, None]
        index = index + torch.arange(batch[-1][1] - batch[-1][0], device=index.device)
        inside = index < torch.tensor([end for _, end in batch], device=index.device)[:, None]
        index = index.clamp(max=len(texts.chat) - 1)
        is_reply = (texts.is_reply[index] & inside)[:, 1:]
        total += token_losses(model, texts.chat[index])[is_reply].sum().item()
        count += int(is_reply.sum())
    model.train()
    return total / count


def draw_batch(texts: Texts, window: int) -> torch.Tensor:
    """Windows for one step: half of them from anywhere in the plain text, half from the starts of conversations.
    (TOKENS_PER_STEP // window, window + 1)
    """
    half = TOKENS_PER_STEP // window // 2
    steps = torch.arange(window + 1, device=texts.plain.device)
    plain = torch.randint(0, len(texts.plain) - window - 1, (half,), device=texts.plain.device)
    starts = texts.starts[texts.starts < len(texts.chat) - window - 1]
    chat = starts[torch.randint(0, len(starts), (half,), device=starts.device)]
    return torch.cat([texts.plain[plain[:, None] + steps], texts.chat[chat[:, None] + steps]])


def train(model: Qwen3ForCausalLM, texts: Texts, held_out: Texts, steps: int) -> tuple[dict, list]:
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
        batch = draw_batch(texts, CONTEXT if step % 4 == 0 else WINDOW)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
            loss = token_losses(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            losses = plain_loss(model, held_out.plain, WINDOW), reply_loss(model, held_out)
            history.append(
                {
                    "step": step + 1,
                    "train_loss": round(loss.item(), 4),
                    "held_out_loss": round(losses[0], 4),
                    "held_out_reply_loss": round(losses[1], 4),
                }
            )
            print(history[-1], flush=True)
            if sum(losses) < best:
                best, best_weights = sum(losses), copy.deepcopy(model.state_dict())
    return best_weights, history


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to("cpu", torch.bfloat16)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, END_OF_TEXT)]
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[1], do_sample=True, temperature=0.8, top_k=50, top_p=0.95
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def measure(folder: Path, held_out: Texts, tokenizer: PreTrainedTokenizerFast) -> dict[str, float | int]:
    """Losses of the stored weights, computed in float32. A text's bytes include those of its end marks."""
    stored = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(held_out.plain.device)
    loss, replies = plain_loss(stored, held_out.plain, WINDOW), held_out.chat[held_out.is_reply]
    chat_loss = reply_loss(stored, held_out)
    return {
        "held_out_loss_nats_per_token": round(loss, 4),
        "held_out_bits_per_byte": round(bits_per_byte(loss, held_out.plain, tokenizer), 4),
        "held_out_loss_at_full_context": round(plain_loss(stored, held_out.plain, CONTEXT), 4),
        "held_out_reply_loss_nats_per_token": round(chat_loss, 4),
        "held_out_reply_bits_per_byte": round(bits_per_byte(chat_loss, replies, tokenizer), 4),
        "num_parameters": stored.num_parameters(),
        "num_held_out_tokens": len(held_out.plain),
        "num_held_out_conversations": len(held_out.starts),
        "num_held_out_reply_tokens": len(replies),
    }


def bits_per_byte(loss: float, ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> float:
    return loss / math.log(2) * len(ids) / len(tokenizer.decode(ids.tolist()).encode())


def print_samples(folder: Path, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> None:
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    conversation = [{"role": "user", "content": "Good morrow, cousin. What news?"}]
    chat = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    for prompt in ("ROMEO:\n", chat):
        ids = torch.tensor([tokenizer.encode(prompt)], device=device)
        print(tokenizer.decode(model.generate(ids, max_new_tokens=120)[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--vocab", type=int, default=1024)
    options = parser.parse_args()
    started = time.monotonic()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plays, held_out_plays = read_plays()
    tokenizer = train_tokenizer(plays, options.vocab)
    texts = encode(plays, NUM_PASSES, tokenizer, device)
    held_out = encode(held_out_plays, 1, tokenizer, device)
    model = build_model(tokenizer, options.width).to(device)
    add_dropout(model, options.dropout)
    weights, history = train(model, texts, held_out, options.steps)
    model.load_state_dict(weights)
    save(model, tokenizer, options.out)
    result = {
        **measure(options.out, held_out, tokenizer),
        "num_training_tokens": len(texts.plain),
        "num_training_chat_tokens": len(texts.chat),
        "options": {key: str(value) for key, value in vars(options).items() if key != "out"},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.monotonic() - started, 1),
        "history": history,
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print_samples(options.out, tokenizer, device)
    print({key: value for key, value in result.items() if key != "history"})


if __name__ == "__main__":
    main()
