"""A GPT in reading order: which attention, the block, the decoder that stacks blocks.

Shapes at the line ends: B sequences in the batch, N tokens in each, C = d_model numbers per token, V entries
in the vocabulary.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_edu.modules import MultiHeadFlashAttention
from flash_edu.reference import naive_attention


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """PyTorch's own. It aligns the causal mask top-left, which is the same here, where Nq = Nk."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


# "flash_edu": None, so that MultiHeadFlashAttention uses its own. "naive" writes the N x N weights to memory.
ATTENTIONS = {"flash_edu": None, "sdpa": sdpa_attention, "naive": naive_attention}


def pick_attention(attention: str | Callable | None) -> Callable | None:
    """A name from ATTENTIONS, or your own function (q, k, v, *, causal) -> out, or None for flash_edu's."""
    if attention is None or callable(attention):
        return attention
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be a function or one of {', '.join(ATTENTIONS)}, got {attention!r}")
    return ATTENTIONS[attention]


class TransformerBlock(nn.Module):
    """Attention between the tokens, then a small network on each token alone; each adds to its input.

    The norm stands *before* each part (pre-norm); the transformer of 2017 had it after the addition
    (post-norm). So `x` itself is never normalised: from the last block to the first the gradient has a way
    through additions only, and a deep stack trains without a delicate warmup (Xiong et al. 2020,
    arXiv:2002.04745). GPT-2 and most models since do it. The price: the output of the stack is not
    normalised, so whoever stacks blocks adds one norm at the end.

    Args: as in `MultiHeadFlashAttention`; `attention` may also be a name, "flash_edu", "sdpa" or "naive".
    """

    def __init__(
        self,
        d_model: int = 512,
        num_heads: int = 8,
        dropout: float = 0.1,
        *,
        causal: bool = False,
        attention: str | Callable | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = MultiHeadFlashAttention(
            d_model, num_heads, causal=causal, dropout=dropout, attention=pick_attention(attention)
        )
        self.norm2 = nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(
            nn.Linear(d_model, 4 * d_model),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * d_model, d_model),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), key_padding_mask=key_padding_mask)  # (B, N, C)
        x = x + self.ffn(self.norm2(x))  # (B, N, C)
        return x


class GPTDecoder(nn.Module):
    """Token ids in; out, at each position, the scores (logits) of the token that comes next.

    The blocks are causal: position i sees positions 0 to i. Without that, the answer is part of the question:
    what position i must predict is the input of position i + 1. The training loss falls towards 0, and the
    model, asked to write, cannot.

    One matrix is both token embedding and head: each goes between a token and d_model numbers.

    Weights start as in GPT-2: normal with deviation 0.02, biases 0. The two layers of a block that add to `x`
    start smaller, by 1 / sqrt(2 * num_layers): `x` is a sum of 2 * num_layers such terms, and so the sum does
    not grow with depth.
    """

    def __init__(
        self,
        vocab_size: int = 50000,
        d_model: int = 768,
        num_heads: int = 12,
        num_layers: int = 12,
        max_seq_len: int = 2048,
        dropout: float = 0.1,
        *,
        attention: str | Callable | None = None,
    ):
        super().__init__()
        sizes = {"vocab_size": vocab_size, "num_layers": num_layers, "max_seq_len": max_seq_len}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.max_seq_len = max_seq_len

        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_seq_len, d_model)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            TransformerBlock(d_model, num_heads, dropout, causal=True, attention=attention)
            for _ in range(num_layers)
        )
        self.ln_f = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight  # one parameter, two names

        self.apply(_init_as_gpt2)
        for layer in self.layers:
            for added in (layer.attention.out_proj, layer.ffn[3]):
                nn.init.normal_(added.weight, std=0.02 / math.sqrt(2 * num_layers))

    def forward(self, input_ids: Tensor) -> Tensor:
        _check_ids(input_ids)
        if input_ids.shape[1] > self.max_seq_len:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens and the model has max_seq_len={self.max_seq_len} "
                "positions; shorten the input, or build the model with a larger max_seq_len"
            )
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (N,)

        x = self.token_embedding(input_ids) + self.position_embedding(positions)  # (B, N, C)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)  # (B, N, C)
        x = self.ln_f(x)  # (B, N, C)
        return self.head(x)  # (B, N, V)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Append max_new_tokens tokens to input_ids (B, N), one at a time.

        temperature: 0 takes the likeliest token every time; below 1 likely ones gain, above 1 they lose.
        top_k: draw among the k likeliest tokens.
        Every step reads the last max_seq_len tokens again. A KV cache saves that work: chapter 15.
        """
        if temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be None or at least 1, got {top_k}")
        _check_ids(input_ids)
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids must hold at least one token to go on from, got none")
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                logits = self(input_ids[:, -self.max_seq_len :])[:, -1]  # (B, V)
                drawn = _draw(logits.float(), temperature, top_k, generator)  # (B, 1)
                input_ids = torch.cat([input_ids, drawn.to(input_ids.dtype)], dim=1)  # (B, N + 1)
        finally:
            self.train(was_training)
        return input_ids

    def num_parameters(self, embeddings: bool = True) -> int:
        """How many numbers are trained. Embedding and head count once, being one."""
        total = sum(parameter.numel() for parameter in self.parameters())
        if embeddings:
            return total
        return total - self.token_embedding.weight.numel() - self.position_embedding.weight.numel()


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}; call .long() on it")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have the shape (batch, seq), got {tuple(input_ids.shape)}")


def _init_as_gpt2(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    vocab_size = logits.shape[-1]
    values, tokens = logits.topk(min(top_k or vocab_size, vocab_size))  # (B, k), (B, k)
    probabilities = torch.softmax(values / temperature, dim=-1)  # (B, k)
    place = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
    return tokens.gather(-1, place)  # (B, 1)
