// The instructions of AMX that csrc/cpu/kernels/amx.h uses, in plain C++, as Intel's manual (volume
// 2, chapter 3) describes them. A use that the processor would refuse ends the program.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulation {

constexpr int TILES = 8;

struct Tile {
    int rows = 0, bytes = 0;  // 0 if not configured
    alignas(64) uint8_t data[16][64] = {};
};

inline Tile tiles[TILES];
inline bool configured = false;

inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "AMX: %s\n", what);
    std::exit(2);
}

inline Tile& tile(int i) {
    require(configured && i >= 0 && i < TILES && tiles[i].rows > 0, "a tile without a shape");
    return tiles[i];
}

inline void clear_after(Tile& t, int rows) {
    for (int r = rows; r < 16; ++r) std::memset(t.data[r], 0, 64);
}

template <typename Add>
void multiply(int sum, int a, int b, Add add) {
    Tile &c = tile(sum), &left = tile(a), &right = tile(b);
    require(c.rows == left.rows && c.bytes == right.bytes && left.bytes == 4 * right.rows,
            "shapes of a product that do not fit");
    require(sum != a && sum != b && a != b, "a product of a tile with itself");
    for (int m = 0; m < c.rows; ++m)
        for (int k = 0; k < left.bytes / 4; ++k)
            for (int n = 0; n < c.bytes / 4; ++n)
                add(c.data[m] + 4 * n, left.data[m] + 4 * k, right.data[k] + 4 * n);
}

inline float widened(const uint8_t* bf16) {
    uint32_t bits = static_cast<uint32_t>(bf16[0]) << 16 | static_cast<uint32_t>(bf16[1]) << 24;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace emulation

inline void _tile_loadconfig(const void* from) {
    const auto* bytes = static_cast<const uint8_t*>(from);
    emulation::require(bytes[0] == 1 && bytes[1] == 0, "a palette other than 1");
    for (int i = 0; i < emulation::TILES; ++i) {
        emulation::Tile& t = emulation::tiles[i];
        uint16_t width;
        std::memcpy(&width, bytes + 16 + 2 * i, 2);
        t = {};
        t.bytes = width;
        t.rows = bytes[48 + i];
        emulation::require(t.rows <= 16 && t.bytes <= 64 && (t.rows == 0) == (t.bytes == 0),
                           "a tile that is too large");
    }
    emulation::configured = true;
}

inline void _tile_release() { emulation::configured = false; }

inline void _tile_zero(int i) { emulation::clear_after(emulation::tile(i), 0); }

inline void _tile_loadd(int i, const void* from, int64_t stride) {
    emulation::Tile& t = emulation::tile(i);
    emulation::clear_after(t, 0);
    for (int r = 0; r < t.rows; ++r)
        std::memcpy(t.data[r], static_cast<const char*>(from) + r * stride, t.bytes);
}

inline void _tile_stored(int i, void* to, int64_t stride) {
    const emulation::Tile& t = emulation::tile(i);
    for (int r = 0; r < t.rows; ++r)
        std::memcpy(static_cast<char*>(to) + r * stride, t.data[r], t.bytes);
}

inline void _tile_dpbf16ps(int sum, int a, int b) {
    emulation::multiply(sum, a, b, [](uint8_t* c, const uint8_t* x, const uint8_t* y) {
        float value;
        std::memcpy(&value, c, 4);
        for (int i = 0; i < 4; i += 2)
            value += emulation::widened(x + i) * emulation::widened(y + i);
        std::memcpy(c, &value, 4);
    });
}

// The left bytes are unsigned, the right ones signed.
inline void _tile_dpbusd(int sum, int a, int b) {
    emulation::multiply(sum, a, b, [](uint8_t* c, const uint8_t* x, const uint8_t* y) {
        int32_t value;
        std::memcpy(&value, c, 4);
        for (int i = 0; i < 4; ++i) value += int32_t{x[i]} * static_cast<int8_t>(y[i]);
        std::memcpy(c, &value, 4);
    });
}
