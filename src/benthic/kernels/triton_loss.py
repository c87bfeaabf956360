"""One kernel that turns a chunk of logits in place into losses and their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.chunked_loss import GradientsInForward, Making, chunk_of
from benthic.kernels.host import next_power_of_2
from benthic.kernels.relaunch import remembered

_ROOM = {"cpu": 64 << 20, "cuda": 600 << 20}


@remembered
@triton.jit
def _turn(
    logits_ptr, target_ptr, loss_ptr, columns, stride, ignore_index,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the log of the sum of exponentials in one pass, softmax - onehot in a second, out of L2.

    Every thread has sums of its own, of eight neighbours at a time, until the row has been read, so that
    nobody waits for others between blocks; blocks on their way through shared memory were slower. The second
    pass begins with what was read last; each thread writes what it read itself, and the target's logit is
    read before the barriers of the sums.
    """
    EACH: tl.constexpr = 8
    row = tl.program_id(0).to(tl.int64)
    at = logits_ptr + row * stride
    target = tl.load(target_ptr + row)
    kept = target != ignore_index
    chosen = tl.load(at + tl.where(kept, target, 0)).to(tl.float32)
    place = tl.arange(0, BLOCK // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    largest = tl.full([BLOCK // EACH], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK // EACH], tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=1):
        column = start + place
        x = tl.load(at + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x, axis=1))
        shift = tl.where(above == -float("inf"), 0.0, above)  # where nothing has been seen
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        largest = above
    whole = tl.max(largest, axis=0)
    lse = whole + tl.log(tl.sum(total * tl.exp(largest - whole), axis=0))
    tl.store(loss_ptr + row, tl.where(kept, lse - chosen, 0.0))
    if GRADIENT:
        last = (tl.cdiv(columns, BLOCK) - 1) * BLOCK
        for start in tl.range(0, columns, BLOCK, num_stages=1):
            column = last - start + place
            inside = column < columns
            x = tl.load(at + column, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(x - lse) - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(kept, gradient, 0.0)
            tl.store(at + column, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def turn(logits, target_t, ignore_index, *, gradient):
    """See `benthic.kernels.chunked_loss.Turn`; gradients take the place of the logits."""
    rows, columns = logits.shape
    loss_t = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = max(8, min(16384, next_power_of_2(columns)))
    # a whole SM for a row: 132 rows of 163,840 words in bfloat16 stay in 50 MB of L2 until they are written
    warps = max(1, min(32, block // 512))
    if rows:
        _turn[(rows,)](
            logits, target_t, loss_t, columns, logits.stride(0), ignore_index,
            GRADIENT=gradient, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss_t, logits if gradient else None


def linear_cross_entropy_sum(
    hidden_TD, weight_VD, target_T, *, factor, ignore_index, chunk, into_VD, fresh, wanted
):
    """See `benthic.kernels.ops.linear_cross_entropy_sum`."""
    if chunk is None:
        tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        chunk = chunk_of(tokens, vocabulary, hidden_TD.dtype.itemsize, _ROOM[hidden_TD.device.type])
    return GradientsInForward.apply(
        hidden_TD,
        weight_VD,
        target_T.long(),
        into_VD,
        Making(factor, ignore_index, chunk, wanted, turn, fresh),
    )
