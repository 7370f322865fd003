"""Layer norm over rows that consist of pieces: the parts of `td_layer_norm` that loop over them.

The address and strides of each piece are arguments of a kernel: nothing is concatenated, and no
table of addresses is copied to the GPU first.

Forward moves x and y through memory once, and the means of backward x and dy: 4 bytes per channel
and row in 16 bits. In forward the L2 cache moves 6 bytes, plus weight and bias for each program. A
program of 16 warps fills a multiprocessor. With ROWS = 2 the rows that are between their first and
second reading on a whole H100 are 20 MB for XL/2R and 35 MB for G/2R: they stay in the cache.
"""

import triton
import triton.language as tl


@triton.jit
def statistics(lane_mean, squares, seen, TOTAL: tl.constexpr):
    """Return mean and rstd of rows from the statistics of each lane.

    `lane_mean` is the mean of the `seen` values of a lane, `squares` their sum of squared
    deviations from it (Welford's algorithm), which stays accurate for any mean of the row. Lanes
    are merged by the formula of Chan, Golub and LeVeque.
    """
    mean = tl.sum(lane_mean * seen, 1)[:, None] / TOTAL
    offset = lane_mean - mean
    variance = tl.sum(squares + offset * offset * seen, 1)[:, None] / TOTAL
    return mean, 1.0 / tl.sqrt(variance + 1e-5)


@triton.jit
def affine(normed, weight_ptr, bias_ptr, inside):
    """Return `normed` times the weight plus the bias."""
    weight = tl.load(weight_ptr, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr, inside, other=0.0).to(tl.float32)
    return normed * weight[None, :] + bias[None, :]


@triton.jit
def select_piece(
    x_ptrs, image_strides, row_strides, piece, FIRST: tl.constexpr, GROUP: tl.constexpr
):
    """Return address and strides of a piece known only at run time, one of GROUP from FIRST."""
    x_ptr, image_stride, row_stride = x_ptrs[FIRST], image_strides[FIRST], row_strides[FIRST]
    for other in tl.static_range(FIRST + 1, min(FIRST + GROUP, len(x_ptrs))):
        x_ptr = tl.where(piece == other, x_ptrs[other], x_ptr)
        image_stride = tl.where(piece == other, image_strides[other], image_stride)
        row_stride = tl.where(piece == other, row_strides[other], row_stride)
    return x_ptr, image_stride, row_stride


@triton.jit
def load_channels(
    x_ptrs,
    image_strides,
    row_strides,
    image,
    row,  # [ROWS, 1]
    channel,  # [1, BLOCK] of the row, from START
    inside,  # [ROWS, BLOCK], whether there is such a row and channel
    START: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Load channels `[ROWS, BLOCK]` in fp32, from one piece or from several; zero if not inside."""
    FIRST: tl.constexpr = START // WIDTH
    LAST: tl.constexpr = min((START + BLOCK - 1) // WIDTH, len(x_ptrs) - 1)
    # Integers: Triton's compiler for AMD GPUs cannot select between tensors of pointers.
    address = tl.zeros([row.shape[0], BLOCK], tl.int64)
    for piece in tl.static_range(FIRST, LAST + 1):
        x_ptr = x_ptrs[piece] + image * image_strides[piece] + row * row_strides[piece]
        address = tl.where(channel // WIDTH == piece, x_ptr.to(tl.int64), address)
    x_ptr = address.to(x_ptrs[FIRST].dtype)
    if ALIGNED:
        # After the selection the compiler no longer knows that 16 bytes are from one piece and
        # aligned.
        VECTOR: tl.constexpr = 128 // x_ptrs[FIRST].dtype.element_ty.primitive_bitwidth
        x_ptr = tl.max_constancy(tl.multiple_of(x_ptr, [1, 16]), [1, VECTOR])
    return tl.load(x_ptr + channel % WIDTH, inside, other=0.0).to(tl.float32)


@triton.jit
def pieces_fwd_kernel(
    x_ptrs,  # PIECES of [B, N, WIDTH]
    weight_ptr,  # [T, PIECES * WIDTH]
    bias_ptr,  # [T, PIECES * WIDTH]
    y_ptr,  # [B, N, PIECES * WIDTH], contiguous
    mean_ptr,  # [B, N] fp32
    rstd_ptr,  # [B, N] fp32
    count,  # N
    image_strides,  # of each piece
    row_strides,  # of each piece
    time_strides,  # of weight and bias; 0 if all images share one time
    ALIGNED: tl.constexpr,  # whether all rows of the pieces are whole multiples of 16 bytes
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TOTAL: tl.constexpr = PIECES * WIDTH
    blocks = tl.cdiv(count, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    wide_row = row.to(tl.int64)
    lane = tl.arange(0, BLOCK)
    statistic = image * count + row

    # Unrolled, so that the pieces of a tile are constants and the loads of several tiles overlap.
    lane_mean = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, TOTAL, BLOCK):
        channel = start + lane[None, :]
        inside = (row < count) & (channel < TOTAL)
        x = load_channels(
            x_ptrs,
            image_strides,
            row_strides,
            image,
            wide_row,
            channel,
            inside,
            start,
            BLOCK,
            WIDTH,
            ALIGNED,
        )
        step = x - lane_mean
        if start + BLOCK > TOTAL:
            step = tl.where(channel < TOTAL, step, 0.0)
        lane_mean += step * (1.0 / (start // BLOCK + 1))
        squares += step * (x - lane_mean)
    seen = (TOTAL // BLOCK + (lane < TOTAL % BLOCK)).to(tl.float32)[None, :]
    mean, rstd = statistics(lane_mean, squares, seen, TOTAL)
    tl.store(mean_ptr + statistic, mean, row < count)
    tl.store(rstd_ptr + statistic, rstd, row < count)

    weight_ptr += image * time_strides[0] + lane
    bias_ptr += image * time_strides[1] + lane
    y_ptr += statistic * TOTAL + lane[None, :]
    # Backwards: the last channels read are still in the cache. ".cs": y must not displace x there.
    for start in tl.static_range((TOTAL - 1) // BLOCK * BLOCK, -1, -BLOCK):
        channel = start + lane[None, :]
        inside = (row < count) & (channel < TOTAL)
        x = load_channels(
            x_ptrs,
            image_strides,
            row_strides,
            image,
            wide_row,
            channel,
            inside,
            start,
            BLOCK,
            WIDTH,
            ALIGNED,
        )
        normed = (x - mean) * rstd
        y = affine(normed, weight_ptr + start, bias_ptr + start, start + lane < TOTAL)
        tl.store(y_ptr + start, y.to(y_ptr.dtype.element_ty), inside, cache_modifier=".cs")


@triton.jit
def pieces_bwd_means_kernel(
    dy_ptr,  # [B, N, PIECES * WIDTH]
    x_ptrs,  # PIECES of [B, N, WIDTH]
    weight_ptr,  # [T, PIECES * WIDTH]
    mean_ptr,  # [B, N] fp32
    rstd_ptr,  # [B, N] fp32
    means_ptr,  # [2, B, N] fp32: mean(g) and mean(g·n)
    images,  # B
    count,  # N
    pieces,  # PIECES at run time, so that the compiler does not unroll the loops over them
    dy_strides,  # (image, row)
    image_strides,  # of each piece
    row_strides,  # of each piece
    weight_stride,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    blocks = tl.cdiv(count, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    wide_row = row.to(tl.int64)
    dy_ptr += image * dy_strides[0] + wide_row * dy_strides[1]
    weight_ptr += image * weight_stride
    statistic = image * count + row
    mean = tl.load(mean_ptr + statistic, row < count, other=0.0)
    rstd = tl.load(rstd_ptr + statistic, row < count, other=0.0)

    total = tl.zeros([ROWS, BLOCK], tl.float32)
    dot = tl.zeros([ROWS, BLOCK], tl.float32)
    # One loop per GROUP of pieces: in a single loop over all pieces, selecting the address would
    # cost more than reading the row.
    for first in tl.static_range(0, PIECES, GROUP):
        for piece in range(first, tl.minimum(first + GROUP, pieces)):
            x_ptr, x_image, x_row = select_piece(
                x_ptrs, image_strides, row_strides, piece, first, GROUP
            )
            x_ptr += image * x_image + wide_row * x_row
            for start in range(0, WIDTH, BLOCK):
                column = start + tl.arange(0, BLOCK)
                channel = piece * WIDTH + column
                inside = (row < count) & (column < WIDTH)[None, :]
                x = tl.load(x_ptr + column, inside, other=0.0).to(tl.float32)
                dy = tl.load(dy_ptr + channel, inside, other=0.0).to(tl.float32)
                weight = tl.load(weight_ptr + channel, column < WIDTH, other=0.0)
                g = dy * weight.to(tl.float32)[None, :]
                total += g
                dot += g * (x - mean)
    total = tl.sum(total, 1)[:, None] / (PIECES * WIDTH)
    dot = tl.sum(dot * rstd, 1)[:, None] / (PIECES * WIDTH)
    tl.store(means_ptr + statistic, total, row < count)
    tl.store(means_ptr + tl.cast(images, tl.int64) * count + statistic, dot, row < count)
