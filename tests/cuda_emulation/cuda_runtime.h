// Just enough of CUDA to run kernels on the host, for tests. A thread is a fiber that runs from one
// barrier to the next; the order of the threads turns around at each, so that a barrier that is
// missing shows. Shared memory is NaN before each block, and out of bounds beyond what the launch
// asked for.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

namespace dimr_fast {
constexpr size_t SHARED_BYTES = 48 << 10;
alignas(16) inline unsigned char shared[SHARED_BYTES];
}  // namespace dimr_fast

namespace emulation {

inline void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "emulation: %s\n", what);
    std::abort();
}

struct Copy {
    void* to;
    const void* from;
    size_t bytes, zeros;
};

struct Thread {
    static constexpr size_t STACK = 256 << 10;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    dim3 index;
    void* fake_stack = nullptr;
    bool finished = false;
    std::vector<std::vector<Copy>> copies;  // the last group is not committed yet
};

inline ucontext_t scheduler;
inline void* scheduler_fake_stack;
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;
inline Thread* current;
inline const std::function<void()>* body;

inline void to_scheduler() {
    Thread& self = *current;
    __sanitizer_start_switch_fiber(self.finished ? nullptr : &self.fake_stack, scheduler_stack,
                                   scheduler_stack_size);
    swapcontext(&self.context, &scheduler);
    __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_stack, &scheduler_stack_size);
}

inline void thread_main() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
    (*body)();
    current->finished = true;
    to_scheduler();
}

inline void resume(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack.get(), Thread::STACK);
    swapcontext(&scheduler, &thread.context);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

inline void prepare(Thread& thread, unsigned i) {
    thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    thread.finished = false;
    thread.fake_stack = nullptr;
    thread.copies.assign(1, {});
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = Thread::STACK;
    makecontext(&thread.context, thread_main, 0);
}

inline void run_block(std::vector<Thread>& threads) {
    for (unsigned i = 0; i < threads.size(); ++i) prepare(threads[i], i);
    for (bool backwards = false; !threads.front().finished; backwards = !backwards) {
        for (size_t i = 0; i < threads.size(); ++i)
            resume(threads[backwards ? threads.size() - 1 - i : i]);
        for (const Thread& thread : threads)
            require(thread.finished == threads.front().finished,
                    "threads of a block meet different barriers");
    }
}

}  // namespace emulation

inline void __syncthreads() { emulation::to_scheduler(); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    using namespace emulation;
    const size_t size = config->blockDim.x * config->blockDim.y * config->blockDim.z;
    if (size == 0 || size > 1024 || config->gridDim.x == 0 || config->gridDim.x > INT32_MAX ||
        config->dynamicSmemBytes > dimr_fast::SHARED_BYTES)
        return cudaErrorInvalidConfiguration;
    std::fprintf(stderr, "launch %u %zu %zu\n", config->gridDim.x, size, config->dynamicSmemBytes);
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    const std::function<void()> call = [&] { kernel(arguments...); };
    body = &call;
    std::vector<Thread> threads(size);
    __asan_poison_memory_region(dimr_fast::shared + config->dynamicSmemBytes,
                                dimr_fast::SHARED_BYTES - config->dynamicSmemBytes);
    for (blockIdx = dim3(0); blockIdx.x < gridDim.x; ++blockIdx.x) {
        std::memset(dimr_fast::shared, 0xff, config->dynamicSmemBytes);
        run_block(threads);
    }
    __asan_unpoison_memory_region(dimr_fast::shared, dimr_fast::SHARED_BYTES);
    return cudaSuccess;
}
