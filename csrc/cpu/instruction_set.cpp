#include "instruction_set.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace dimr_fast {
namespace {

constexpr const char* NAMES[] = {"portable", "AVX2", "AVX-512", "AVX-512 with BF16", "AMX"};

#if defined(__x86_64__)
// Whether the processor multiplies tiles of bf16 numbers and 8-bit integers, and Linux lets this
// process use them: it saves their large registers only for processes that have asked.
bool has_amx() {
#if defined(__linux__)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return (d & BF16) && (d & TILE) && (d & INT8) &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

InstructionSet best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vnni"))
        return has_amx() ? InstructionSet::AMX : InstructionSet::AVX512BF16;
    if (avx2 && avx512) return InstructionSet::AVX512;
    if (avx2) return InstructionSet::AVX2;
#endif
    return InstructionSet::PORTABLE;
}

std::atomic<InstructionSet> chosen{best()};

}  // namespace

InstructionSet instruction_set() { return chosen.load(std::memory_order_relaxed); }

}  // namespace dimr_fast

extern "C" {

__attribute__((visibility("default"))) const char* dimr_fast_instruction_set() {
    return dimr_fast::NAMES[static_cast<int>(dimr_fast::instruction_set())];
}

// For tests: switches to an instruction set and returns 0, or returns 1 if this processor lacks it.
__attribute__((visibility("default"))) int dimr_fast_use_instruction_set(const char* name) {
    for (int i = 0; i <= static_cast<int>(dimr_fast::best()); ++i)
        if (std::strcmp(dimr_fast::NAMES[i], name) == 0) {
            dimr_fast::chosen = static_cast<dimr_fast::InstructionSet>(i);
            return 0;
        }
    return 1;
}
}
