"""GPT-2 in PyTorch as one writes it for speed, trained as nanoGPT trains: the peer of the benchmarks.

scaled_dot_product_attention with is_causal, one product for query, key and value, fused AdamW whose decay falls on
matrices alone, a clip of the gradient's norm; on GPUs autocast and GradScaler. No other package than torch. The
hyperparameters are those of nanoGPT's config/train_shakespeare_char.py; biases and dropout are as given.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE, MIN_LEARNING_RATE, WARMUP_STEPS = 1e-3, 1e-4, 100
BETAS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.99), 0.1, 1.0

Rate = Callable[[int], float]  # updates made -> learning rate


class Block(nn.Module):
    """A GPT-2 block: layer norm before attention and before the MLP, tanh GELU."""

    def __init__(self, width: int, heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.up, self.down = nn.Linear(width, 4 * width, bias), nn.Linear(4 * width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        drop = self.dropout if self.training else 0.0
        q, k, v = self.qkv(self.ln_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
        x = x + F.dropout(self.proj(mixed.transpose(1, 2).reshape(batch, length, width)), drop)
        return x + F.dropout(self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh")), drop)


class GPT2(nn.Module):
    """GPT-2, its output layer the token embedding; initialized as the paper's. `forward` returns the mean loss."""

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        context: int,
        vocabulary: int,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, bias, dropout) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, bias=bias)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                last = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def warmup_cosine(total_steps: int) -> Rate:
    """Return nanoGPT's schedule: linear warmup, then a cosine to a tenth."""

    def rate(step: int) -> float:
        if step < WARMUP_STEPS:
            return LEARNING_RATE * (step + 1) / (WARMUP_STEPS + 1)
        part = min(1.0, (step - WARMUP_STEPS) / max(1, total_steps - WARMUP_STEPS))
        return MIN_LEARNING_RATE + 0.5 * (1 + math.cos(math.pi * part)) * (LEARNING_RATE - MIN_LEARNING_RATE)

    return rate


def make_step(
    model: GPT2, device: str = "cpu", compute: str = "fp32", compiled: bool = False, rate: Rate | None = None
) -> Callable[[np.ndarray], float]:
    """Return a step: a batch [B, T+1] in, the loss out when the update is done.

    `compute` is fp32, fp16 or bf16. Without `rate` the learning rate is constant.
    """
    model = model.to(device).train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=compute == "fp16")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[compute]
    forward = torch.compile(model) if compiled else model
    steps = 0

    def step(batch: np.ndarray) -> float:
        nonlocal steps
        for group in optimizer.param_groups if rate else ():
            group["lr"] = rate(steps)
        steps += 1
        tokens = torch.from_numpy(batch).long().to(device, non_blocking=True)
        with torch.autocast(device, dtype, enabled=compute != "fp32"):
            loss = forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        scaler.step(optimizer)
        scaler.update()
        return loss.item()  # waits for the device

    return step


@torch.no_grad()
def mean_loss(model: GPT2, rows: np.ndarray, batch: int) -> float:
    """Return the mean loss of rows [n, T+1], `batch` at a time, without dropout."""
    model.eval()
    total = 0.0
    for start in range(0, len(rows), batch):
        tokens = torch.from_numpy(rows[start : start + batch]).long().to(next(model.parameters()).device)
        total += model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).item() * len(tokens)
    model.train()
    return total / len(rows)
