// Versions of the build, for `dimr_fast._extension`. Links neither torch nor CUDA, so it can always
// be imported. The operators are registered when `_extension` loads the libraries.

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_bindings, m) {
    m.doc() = "What the compiled libraries of dimr_fast were built from.";
    m.attr("version") = DIMR_FAST_VERSION;
    m.attr("torch") = DIMR_FAST_TORCH;
    m.attr("compiler") = DIMR_FAST_COMPILER;
    m.attr("cuda") = DIMR_FAST_CUDA;
    m.attr("cuda_architectures") = DIMR_FAST_CUDA_ARCHITECTURES;
}
