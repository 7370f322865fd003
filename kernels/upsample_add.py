"""The cascade after its projection: pixel shuffle, TD layer norm and the add to `x`.

    y = shuffle(projected)    n = (y − mean(y)) · rstd    out = x + n · weight + bias

and backward, with g = dout · weight, at the shuffled positions:

    dprojected = rstd · (g − mean(g) − n · mean(g·n))    dweight = Σ dout · n    dbias = Σ dout

`projected` is `[B, h, w, q²·D]`; its channels are ordered `[row, column, D]` within a box of q×q,
so that the position (h·q + i, w·q + j) of the output reads D adjacent numbers.

Rows of D numbers stay in registers. Forward moves x, projected and out once, backward dout,
projected and dprojected. The norm before the projection is `td_layer_norm` over rows of pieces.
upsample_add.md gives the reasons.
"""

import torch
import triton
import triton.language as tl

from dimr_fast.kernels.configuration import configuration
from dimr_fast.kernels.rows import as_rows, as_values, chunks, sum_partials


def launch_fwd(
    x: torch.Tensor,
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output `[B, H, W, D]`, and mean and rstd `[B, H·W]` of the normed rows."""
    dtype = torch.promote_types(x.dtype, projected.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = as_rows(x)
    images, count, width = rows.shape
    mean = torch.empty(images, count, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return out, mean, rstd
    weight, weight_stride = as_values(weight)
    bias, bias_stride = as_values(bias)
    constants = configuration("upsample_add_fwd", width, x.device)
    _upsample_add_fwd_kernel[(images * triton.cdiv(count, constants["ROWS"]),)](
        rows,
        projected.contiguous(),
        weight,
        bias,
        out,
        mean,
        rstd,
        x.shape[1],
        x.shape[2],
        (rows.stride(0), rows.stride(1)),
        weight_stride,
        bias_stride,
        Q=x.shape[1] // projected.shape[1],
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        **constants,
    )
    return out, mean, rstd


def launch_bwd(
    dout: torch.Tensor,
    projected: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    times: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `projected`, of weight and bias `[2, times, D]`, and a sum `[q²·D]`.

    The sum is the gradient of `projected` summed over images and positions, which is the gradient
    of the projection's bias.
    """
    dprojected = torch.empty(projected.shape, dtype=projected.dtype, device=dout.device)
    dout_rows = as_rows(dout)
    images, count, width = dout_rows.shape
    q = dout.shape[1] // projected.shape[1]
    if dout.numel() == 0:
        parameters = torch.zeros(2, times, width, dtype=torch.float32, device=dout.device)
        return dprojected, parameters, parameters.new_zeros(q * q * width)
    weight, weight_stride = as_values(weight)
    constants = configuration("upsample_add_bwd", width, dout.device)
    boxes = count // (q * q)
    programs, per_program = chunks(images * q * q, boxes, constants["ROWS"])
    partials = torch.empty(
        3, images, programs, q * q, width, dtype=torch.float32, device=dout.device
    )
    _upsample_add_bwd_kernel[(images * programs * q * q,)](
        dout_rows,
        projected.contiguous(),
        weight,
        mean,
        rstd,
        dprojected,
        partials,
        images,
        boxes,
        projected.shape[2],
        programs,
        per_program,
        (dout_rows.stride(0), dout_rows.stride(1)),
        weight_stride,
        Q=q,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        **constants,
    )
    parameters = sum_partials(partials[:2].view(2 * images, programs * q * q, width), 2 * times)
    total = sum_partials(partials[2].flatten(2), 1)
    return dprojected, parameters.unflatten(0, (2, times)), total[0]


@triton.jit
def _upsample_add_fwd_kernel(
    x_ptr,  # [B, H * W, WIDTH]
    projected_ptr,  # [B, H // Q, W // Q, Q * Q, WIDTH], contiguous
    weight_ptr,  # [T, WIDTH]
    bias_ptr,  # [T, WIDTH]
    out_ptr,  # [B, H * W, WIDTH], contiguous
    mean_ptr,  # [B, H * W] fp32
    rstd_ptr,  # [B, H * W] fp32
    H,
    W,
    x_strides,  # (image, row)
    weight_stride,  # 0 if all images share one time
    bias_stride,
    Q: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = H * W
    blocks = tl.cdiv(count, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < WIDTH)[None, :]
    box = image * (count // (Q * Q)) + row // W // Q * (W // Q) + row % W // Q
    segment = row // W % Q * Q + row % W % Q

    source = (box * (Q * Q) + segment)[:, None] * WIDTH + column
    y = tl.load(projected_ptr + source, inside, other=0.0).to(tl.float32)
    mean = tl.sum(y, 1) / WIDTH
    centred = tl.where(inside, y - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + 1e-5)
    tl.store(mean_ptr + image * count + row, mean, row < count)
    tl.store(rstd_ptr + image * count + row, rstd, row < count)

    weight = tl.load(weight_ptr + image * weight_stride + column, column < WIDTH, other=0.0)
    bias = tl.load(bias_ptr + image * bias_stride + column, column < WIDTH, other=0.0)
    x_ptr += image * x_strides[0] + row[:, None].to(tl.int64) * x_strides[1]
    x = tl.load(x_ptr + column, inside, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None]
    out = x + (normed * weight.to(tl.float32)[None, :] + bias.to(tl.float32)[None, :])
    out_ptr += (image * count + row[:, None]) * WIDTH + column
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _upsample_add_bwd_kernel(
    dout_ptr,  # [B, h * Q * w * Q, WIDTH]
    projected_ptr,  # [B, h * w, Q * Q, WIDTH], contiguous
    weight_ptr,  # [T, WIDTH]
    mean_ptr,  # [B, h * Q * w * Q] fp32
    rstd_ptr,  # [B, h * Q * w * Q] fp32
    dprojected_ptr,  # [B, h * w, Q * Q, WIDTH], contiguous
    partials_ptr,  # [3, B, programs, Q * Q, WIDTH] fp32: gradients of weight, bias and projected
    images,  # B
    boxes,  # h * w
    w,
    programs,
    per_program,
    dout_strides,  # (image, row)
    weight_stride,  # 0 if all images share one time
    Q: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program handles one place (segment) in many boxes, so all its sums are of the same channels.
    segment = tl.program_id(0) % (Q * Q)
    program = tl.program_id(0) // (Q * Q)
    image = (program // programs).to(tl.int64)
    first = program % programs * per_program
    column = tl.arange(0, BLOCK)
    dout_ptr += image * dout_strides[0] + column[None, :]
    weight = tl.load(weight_ptr + image * weight_stride + column, column < WIDTH, other=0.0)
    weight = weight.to(tl.float32)[None, :]

    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + per_program, boxes), ROWS):
        box = start + tl.arange(0, ROWS)
        inside = (box < boxes)[:, None] & (column < WIDTH)[None, :]
        row = (box // w * Q + segment // Q) * (w * Q) + box % w * Q + segment % Q
        statistic = image * boxes * (Q * Q) + row
        mean = tl.load(mean_ptr + statistic, box < boxes, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + statistic, box < boxes, other=0.0)[:, None]
        dout = tl.load(dout_ptr + row[:, None].to(tl.int64) * dout_strides[1], inside, other=0.0)
        dout = dout.to(tl.float32)
        source = ((image * boxes + box) * (Q * Q) + segment)[:, None] * WIDTH + column
        y = tl.load(projected_ptr + source, inside, other=0.0).to(tl.float32)
        normed = tl.where(inside, (y - mean) * rstd, 0.0)
        g = dout * weight
        dot = tl.sum(g * normed, 1)[:, None] / WIDTH
        dy = rstd * (g - tl.sum(g, 1)[:, None] / WIDTH - normed * dot)
        dy = tl.where(inside, dy, 0.0)
        tl.store(dprojected_ptr + source, dy.to(dprojected_ptr.dtype.element_ty), inside)
        dweight += dout * normed
        dbias += dout
        total += dy

    partials_ptr += tl.program_id(0).to(tl.int64) * WIDTH + column
    one = tl.cast(images, tl.int64) * programs * (Q * Q * WIDTH)
    tl.store(partials_ptr, tl.sum(dweight, 0), column < WIDTH)
    tl.store(partials_ptr + one, tl.sum(dbias, 0), column < WIDTH)
    tl.store(partials_ptr + 2 * one, tl.sum(total, 0), column < WIDTH)
