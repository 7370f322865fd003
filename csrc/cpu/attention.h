#pragma once

#include "kernels/attention.h"

namespace dimr_fast {

// Runs the kernel over all tasks; sets `splits`.
void run_attention(const Attention& p);

}  // namespace dimr_fast
