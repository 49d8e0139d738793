"""Chapter 13: what stands between a text and a model that learns it, and your own kernel inside that model.

B windows in a batch, N bytes in each, V = 256 different bytes; H heads with D numbers each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def next_byte_batch(data: Tensor, block: int, starts: Tensor) -> tuple[Tensor, Tensor]:
    """13.1  Windows of a text, and what must be predicted at each of their positions: the byte after it.

    data (bytes,) uint8; block is N; starts (B,) int64, where each window begins
    -> inputs (B, N) int64, targets (B, N) int64

        inputs[b, i]  = data[starts[b] + i]
        targets[b, i] = data[starts[b] + i + 1]             i = 0 .. N - 1

    Every start is at most len(data) - N - 1. Starts come in any order and may repeat. data and starts are on one
    device, and so are inputs and targets. Token ids are int64: an embedding takes no uint8.
    """
    # your code here (about 3 lines)
    offsets = torch.arange(block + 1, device=data.device)  # (N + 1,) inputs, and one byte more
    windows = data[starts[:, None] + offsets].long()  # (B, N + 1)
    return windows[:, :-1], windows[:, 1:]
    # end of your code


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    max_norm: float = 1.0,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[float, float]:
    """13.2  One step of training, in this order: forget, forward, loss, backward, clip, step.

    model(inputs) -> logits (B, N, V); inputs (B, N) int64, targets (B, N) int64
    -> loss, grad_norm: two Python floats

        loss = mean over b, i of  -log softmax(logits[b, i])[targets[b, i]]       nats per byte
        g    = d loss / d parameters                    all of them, as one long vector
        g   <- g * min(1, max_norm / |g|)               clipping (Pascanu et al. 2013, arXiv:1211.5063)

    Gradients that the parameters hold already are forgotten first. With an autocast_dtype, the forward runs
    under torch.autocast with it, on the device of inputs; None means no autocast. (Not float16: it would need
    a scaler.) The loss is computed in float32, whatever the dtype of the logits. loss is that of the weights
    before the step, and grad_norm is |g| before clipping.
    """
    # your code here (about 8 lines)
    optimizer.zero_grad()
    with torch.autocast(inputs.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        logits = model(inputs)  # (B, N, V)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item(), grad_norm.item()
    # end of your code


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """13.3  Your kernels, for models whose head dimension is no power of two.

    q (B, H, Nq, D), k and v (B, H, Nk, D), with any D from 1 to 256
    -> softmax(Q K^T / sqrt(D)) V, (B, H, Nq, D)

    ch09_module.flash_attention takes D = 16, 32, 64, 128 and 256. For another D, give it the next larger one,
    with zeros behind the numbers of q, k and v: they add nothing to a dot product, and come out as zeros at
    the end of each row of O. Where D is one of the five, q, k and v go on as they are: nothing is copied.
    """
    from . import ch09_module  # not at the top of the file: 13.1 and 13.2 work where there is no Triton

    # your code here (about 7 lines)
    D = q.shape[-1]
    wide = max(16, 1 << (D - 1).bit_length())  # the next power of two
    if wide > D:
        q, k, v = (F.pad(x, (0, wide - D)) for x in (q, k, v))  # (B, H, N, wide)
    out = ch09_module.flash_attention(q, k, v, causal=causal, scale=D**-0.5)
    return out[..., :D]
    # end of your code
