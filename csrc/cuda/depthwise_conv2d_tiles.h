// How the depthwise convolution is split into blocks; does not depend on torch or CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dimr_fast {

// Features are [batch, height, width, channels], filters [channels, 1, kernel, kernel].
struct DepthwiseShape {
    int64_t batch;
    int height, width, channels, kernel;
};

// A block has `lanes` channels by `groups` of neighbouring columns, one thread each, and moves down
// `rows` rows. There are `segments` such blocks from top to bottom of an image.
struct DepthwiseTiles {
    int lanes, groups, rows;
    int channel_tiles, column_tiles, segments;

    int threads() const { return lanes * groups; }
    int64_t per_image() const { return int64_t{segments} * column_tiles; }
};

// The largest number of channels and of groups.
constexpr int DEPTHWISE_LANES = 32, DEPTHWISE_GROUPS = 4;
constexpr int DEPTHWISE_THREADS = DEPTHWISE_LANES * DEPTHWISE_GROUPS;

// The columns of one thread: the most for which its sums and the filter stay in registers.
constexpr int depthwise_columns(int kernel) { return kernel <= 7 ? 8 : 4; }

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Rows of x that are read for one segment, plus about as many for the cost of its start.
inline int depthwise_rows_read(const DepthwiseShape& shape, int rows) {
    return std::min(rows + shape.kernel - 1, shape.height) + 3;
}

// Returns tiles over the whole height of an image.
inline DepthwiseTiles depthwise_columns_tiles(const DepthwiseShape& shape) {
    DepthwiseTiles tiles{};
    // 8 channels are 16 bytes of a half-precision type.
    for (int lanes : {DEPTHWISE_LANES, 16, 8})
        if (tiles.lanes == 0 || ceil_div(shape.channels, lanes) * lanes <
                                    ceil_div(shape.channels, tiles.lanes) * tiles.lanes)
            tiles.lanes = lanes;
    tiles.channel_tiles = ceil_div(shape.channels, tiles.lanes);
    const int groups = ceil_div(shape.width, depthwise_columns(shape.kernel));
    tiles.column_tiles = ceil_div(groups, DEPTHWISE_GROUPS);
    tiles.groups = ceil_div(groups, tiles.column_tiles);
    tiles.rows = shape.height;
    tiles.segments = 1;
    return tiles;
}

// Returns the split into segments with the least `time(tiles)`. Short segments fill the GPU, but
// each also reads k - 1 rows of its neighbours.
template <typename Time>
DepthwiseTiles depthwise_best_segments(const DepthwiseShape& shape, const Time& time) {
    DepthwiseTiles tiles = depthwise_columns_tiles(shape), best = tiles;
    int64_t least = time(tiles);
    for (int segments = 2; segments <= std::min(shape.height, 64); ++segments) {
        tiles.rows = ceil_div(shape.height, segments);
        tiles.segments = ceil_div(shape.height, tiles.rows);
        if (time(tiles) < least) {
            least = time(tiles);
            best = tiles;
        }
    }
    return best;
}

inline DepthwiseTiles depthwise_fwd_tiles(const DepthwiseShape& shape, int processors) {
    return depthwise_best_segments(shape, [&](const DepthwiseTiles& tiles) {
        const int64_t blocks = shape.batch * tiles.channel_tiles * tiles.per_image();
        const int64_t busiest = (blocks + processors - 1) / processors;
        // With fewer than about five warps a multiprocessor waits for the latency of its
        // arithmetic.
        const int64_t warps = std::max<int64_t>(busiest * ceil_div(tiles.threads(), 32), 5);
        return depthwise_rows_read(shape, tiles.rows) * warps;
    });
}

// Returns the number of blocks that share the segments of a channel tile: as many as run at once.
inline int64_t depthwise_splits(const DepthwiseShape& shape, const DepthwiseTiles& tiles,
                                int processors) {
    const int64_t resident = int64_t{processors} * 3 * DEPTHWISE_THREADS / tiles.threads();
    const int64_t visits = shape.batch * tiles.per_image();
    const int64_t splits = std::clamp<int64_t>(resident / tiles.channel_tiles, 1, visits);
    const int64_t visits_each = (visits + splits - 1) / splits;
    return (visits + visits_each - 1) / visits_each;
}

inline DepthwiseTiles depthwise_weight_tiles(const DepthwiseShape& shape, int processors) {
    return depthwise_best_segments(shape, [&](const DepthwiseTiles& tiles) {
        const int64_t visits = shape.batch * tiles.per_image();
        const int64_t splits = depthwise_splits(shape, tiles, processors);
        return (visits + splits - 1) / splits * depthwise_rows_read(shape, tiles.rows);
    });
}

}  // namespace dimr_fast
