"""Train a Doge that learns which keys its queries may see, and run only these.

    python examples/train_dma.py [STEPS] [LENGTH]

Dynamic mask attention adds a number per key to the scores, made from its value, and each query sees
the `keep_window_size` keys before it that have the largest numbers. Here a small one learns to
recall: pairs of words stand at the beginning of a prompt, and long after them the first word of a
pair asks for the second one. transformers computes the mask densely, N x N; compiled with
`training="sparse"` the model computes the kept keys alone, with the same gradients.
"""

import sys

import torch
from torch.nn import functional as F
from transformers import DogeConfig, DogeForCausalLM

import mpass

WORDS, PAIRS, KEEP, BATCH = 32, 4, 64, 16


def recall(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [B, N] with pairs in front and a question at the end; the answers [B]."""
    firsts = torch.rand(BATCH, WORDS).argsort(1)[:, :PAIRS]
    seconds = torch.randint(WORDS, 2 * WORDS, firsts.shape)
    prompts = torch.randint(2 * WORDS, 4 * WORDS, (BATCH, length))  # noise
    prompts[:, : 2 * PAIRS] = torch.stack([firsts, seconds], 2).flatten(1)
    asked, rows = torch.randint(PAIRS, (BATCH,)), torch.arange(BATCH)
    prompts[:, -1] = firsts[rows, asked]
    return prompts, seconds[rows, asked]


def main(steps: str = "400", length: str = "512") -> None:
    """Train, and print the loss, how many answers are right, and what became of the attention."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = {"vocab_size": 4 * WORDS, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = DogeConfig(keep_window_size=KEEP, use_cache=False, **sizes, **heads, **tokens)
    model = DogeForCausalLM(config)
    mpass.compile(model, training="sparse", min_seq_len=KEEP + 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)

    for step in range(1, int(steps) + 1):
        prompts, answers = recall(int(length))
        logits = model(prompts, logits_to_keep=1).logits[:, -1]
        loss = F.cross_entropy(logits, answers)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 0 or step == int(steps):
            right = (logits.argmax(1) == answers).float().mean()
            print(f"step {step}: loss {loss.item():.3f}, {right.item():.0%} of the answers right")
    print(mpass.last_report())


if __name__ == "__main__":
    main(*sys.argv[1:])
