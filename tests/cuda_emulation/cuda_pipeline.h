// Asynchronous copies, for tests: each is made when its thread waits for it and not before.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
    const bool aligned = reinterpret_cast<uintptr_t>(to) % bytes == 0 &&
                         reinterpret_cast<uintptr_t>(from) % bytes == 0;
    emulation::require(aligned && zeros <= bytes && (bytes == 4 || bytes == 8 || bytes == 16),
                       "a copy that a GPU does not make");
    emulation::current->copies.back().push_back({to, from, bytes, zeros});
}

inline void __pipeline_commit() { emulation::current->copies.emplace_back(); }

// Returns when all but the last `groups` committed groups are there.
inline void __pipeline_wait_prior(size_t groups) {
    auto& copies = emulation::current->copies;
    while (copies.size() - 1 > groups) {
        for (const auto& copy : copies.front()) {
            std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
            std::memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
        }
        copies.erase(copies.begin());
    }
}
