// Runs one launch of the depthwise convolution, its kernels compiled for the host. The arguments
// are numbers, see `main`; tensors come through stdin and leave through stdout, each as its number
// of bytes in 64 bits, then the bytes.

#include <string>

#include "cuda/depthwise_conv2d_launch.cuh"

using namespace dimr_fast;

namespace {

// Memory of exactly this size, so that one byte beyond it is an error.
using Bytes = std::unique_ptr<char[]>;

Bytes read_tensor() {
    int64_t bytes = 0;
    emulation::require(std::fread(&bytes, 8, 1, stdin) == 1, "no tensor on stdin");
    Bytes data(new char[bytes]);
    emulation::require(std::fread(data.get(), 1, bytes, stdin) == static_cast<size_t>(bytes),
                       "a tensor on stdin is cut off");
    return data;
}

Bytes poisoned(int64_t bytes) {
    Bytes data(new char[bytes]);
    std::memset(data.get(), 0xff, bytes);
    return data;
}

void write_tensor(const Bytes& data, int64_t bytes) {
    std::fwrite(&bytes, 8, 1, stdout);
    std::fwrite(data.get(), 1, bytes, stdout);
}

struct Arguments {
    DepthwiseShape shape;
    bool residual, has_bias;
    Queue queue;
    struct {
        int64_t offset, batch, row, pixel;
    } x, dy;
    int64_t weight_offset;

    template <typename T>
    const T* weight(const Bytes& storage) const {
        return reinterpret_cast<const T*>(storage.get()) + weight_offset;
    }
};

template <typename T>
Features<T> view(const Bytes& storage, const DepthwiseShape& shape, const auto& at) {
    return make_features<T>(reinterpret_cast<const T*>(storage.get()) + at.offset, shape, at.batch,
                            at.row, at.pixel);
}

template <typename T>
cudaError_t forward(const Arguments& a) {
    const Bytes x = read_tensor(), weight = read_tensor(), bias = read_tensor();
    const int64_t bytes =
        a.shape.batch * a.shape.height * a.shape.width * a.shape.channels * sizeof(T);
    const Bytes y = poisoned(bytes);
    const cudaError_t error =
        launch_fwd<T>(a.queue, view<T>(x, a.shape, a.x), a.weight<T>(weight),
                      a.has_bias ? reinterpret_cast<const T*>(bias.get()) : nullptr,
                      reinterpret_cast<T*>(y.get()), a.shape, a.residual, false);
    write_tensor(y, bytes);
    return error;
}

template <typename T>
cudaError_t backward(const Arguments& a) {
    const Bytes dy_storage = read_tensor(), x_storage = read_tensor(), weight = read_tensor();
    const int64_t taps = int64_t{a.shape.kernel} * a.shape.kernel, channels = a.shape.channels;
    const int64_t bytes = a.shape.batch * a.shape.height * a.shape.width * channels * sizeof(T);
    const Features<T> x = view<T>(x_storage, a.shape, a.x), dy = view<T>(dy_storage, a.shape, a.dy);
    const Bytes dx = poisoned(bytes), dweight = poisoned(channels * taps * 4);
    const Bytes dbias = poisoned(channels * 4);
    const cudaError_t error =
        launch_fwd<T>(a.queue, dy, a.weight<T>(weight), nullptr, reinterpret_cast<T*>(dx.get()),
                      a.shape, a.residual, true);
    if (error != cudaSuccess) return error;
    const WeightSplits plan = weight_splits(a.queue, x, dy, a.shape);
    const Bytes partial = poisoned(plan.splits * (taps + 1) * channels * 4);
    const auto floats = [](const Bytes& data) { return reinterpret_cast<float*>(data.get()); };
    const cudaError_t last = launch_weight<T>(a.queue, x, dy, floats(partial), floats(dweight),
                                              floats(dbias), a.shape, plan);
    write_tensor(dx, bytes);
    write_tensor(dweight, channels * taps * 4);
    write_tensor(dbias, channels * 4);
    return last;
}

template <typename T>
cudaError_t run(const std::string& operation, const Arguments& a) {
    return operation == "fwd" ? forward<T>(a) : backward<T>(a);
}

}  // namespace

int main(int count, char** values) {
    emulation::require(count == 20, "19 arguments wanted");
    const std::string operation = values[1], dtype = values[2];
    int next = 3;
    const auto number = [&] { return std::stoll(values[next++]); };
    const auto side = [&] { return static_cast<int>(number()); };
    Arguments a{};
    a.shape.batch = number();
    for (int* size : {&a.shape.height, &a.shape.width, &a.shape.channels, &a.shape.kernel})
        *size = side();
    a.residual = number();
    a.has_bias = number();
    a.queue = {nullptr, side()};
    a.x = {number(), number(), number(), number()};
    a.dy = {number(), number(), number(), number()};
    a.weight_offset = number();
    const cudaError_t error = dtype == "float32"    ? run<float>(operation, a)
                              : dtype == "bfloat16" ? run<__nv_bfloat16>(operation, a)
                                                    : run<__half>(operation, a);
    emulation::require(error == cudaSuccess, "a launch that a GPU refuses");
}
