// The kernels under kernels/ are compiled once for each instruction set, in a namespace of its
// name; one of them is chosen when the library is loaded. They do not depend on torch, and use
// nothing from the standard library that is not inlined: the linker could keep a function that two
// instruction sets share in the instructions of the wrong one.
#pragma once

namespace dimr_fast {

enum class InstructionSet { PORTABLE, AVX2, AVX512, AVX512BF16, AMX };

// Returns the best instruction set of this processor, or the one that a test chose.
InstructionSet instruction_set();

#if defined(__x86_64__)
#define DIMR_FAST_DECLARE(...) \
    namespace portable {       \
    __VA_ARGS__;               \
    }                          \
    namespace avx2 {           \
    __VA_ARGS__;               \
    }                          \
    namespace avx512 {         \
    __VA_ARGS__;               \
    }                          \
    namespace avx512bf16 {     \
    __VA_ARGS__;               \
    }
#define DIMR_FAST_CHOOSE_FOR(set, function)                                         \
    (::dimr_fast::choose(set, portable::function, avx2::function, avx512::function, \
                         avx512bf16::function))
#else
#define DIMR_FAST_DECLARE(...) \
    namespace portable {       \
    __VA_ARGS__;               \
    }
#define DIMR_FAST_CHOOSE_FOR(set, function) ((void)(set), portable::function)
#endif
#define DIMR_FAST_CHOOSE(function) DIMR_FAST_CHOOSE_FOR(::dimr_fast::instruction_set(), function)

template <typename Function>
Function* choose(InstructionSet set, Function* portable, Function* avx2, Function* avx512,
                 Function* avx512bf16) {
    switch (set) {
        case InstructionSet::AMX:
        case InstructionSet::AVX512BF16:
            return avx512bf16;
        case InstructionSet::AVX512:
            return avx512;
        case InstructionSet::AVX2:
            return avx2;
        default:
            return portable;
    }
}

}  // namespace dimr_fast
