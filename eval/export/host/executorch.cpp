// ExecuTorch's Module behind a C interface, for a process without PyTorch. executorch.py compiles and calls it.
//
// Every function returns 0, or an error of executorch/runtime/core/error.h, or one of the numbers below.

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::EValue;

// The wheel ships the library of the thread pool, not its header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {
constexpr int kOutputCount = 1001, kOutputSize = 1002, kThreads = 1003;

struct Array {  // as in executorch.py
  void* data;
  int64_t bytes;
  int32_t dtype;
  int32_t rank;
  const int32_t* sizes;
};
}  // namespace

extern "C" {

int host_threads(uint32_t count) {
  auto* pool = executorch::extension::threadpool::get_threadpool();
  return pool != nullptr && pool->_unsafe_reset_threadpool(count) ? 0 : kThreads;
}

// A program, its methods loaded when they first run. Freed by host_close.
int host_open(const char* path, void** handle) {
  // File: weights are read, repacked by XNNPACK and freed; mapped pages would count as resident beside the repacked ones.
  auto module = std::make_unique<Module>(
      std::string(path), Module::LoadMode::File, nullptr, nullptr, nullptr, /*share_memory_arenas=*/true);
  const auto error = module->load(executorch::runtime::Program::Verification::InternalConsistency);
  if (error != executorch::runtime::Error::Ok) return static_cast<int>(error);
  *handle = module.release();
  return 0;
}

void host_close(void* handle) { delete static_cast<Module*>(handle); }

int host_load(void* handle, const char* method) {
  return static_cast<int>(static_cast<Module*>(handle)->load_method(method));
}

// Runs a method; its outputs, contiguous, are copied to `outputs`, whose sizes in bytes must be right.
int host_run(
    void* handle, const char* method, const Array* inputs, int32_t input_count, const Array* outputs, int32_t output_count) {
  std::vector<TensorPtr> tensors;
  std::vector<EValue> values;
  for (int32_t i = 0; i < input_count; ++i) {
    const Array& given = inputs[i];
    std::vector<SizesType> sizes(given.sizes, given.sizes + given.rank);
    tensors.push_back(from_blob(given.data, std::move(sizes), static_cast<ScalarType>(given.dtype)));
    values.emplace_back(tensors.back());
  }
  auto answer = static_cast<Module*>(handle)->execute(method, values);
  if (!answer.ok()) return static_cast<int>(answer.error());
  if (static_cast<int32_t>(answer->size()) != output_count) return kOutputCount;
  for (int32_t i = 0; i < output_count; ++i) {
    const auto tensor = answer.get()[i].toTensor();
    if (static_cast<int64_t>(tensor.nbytes()) != outputs[i].bytes) return kOutputSize;
    std::memcpy(outputs[i].data, tensor.const_data_ptr(), outputs[i].bytes);
  }
  return 0;
}

}  // extern "C"
