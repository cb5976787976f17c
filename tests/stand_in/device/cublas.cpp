// Fake cuBLAS, as far as torch's matrix products call it: a product adds an entry to the log.
//
// Functions declare only the arguments that they read; callers may pass more.
#include "device.h"

using namespace stand_in;

namespace {

constexpr int kSuccess = 0, kExecutionFailed = 13;

struct Handle {
  cudaStream_t stream = nullptr;
};

int product_on(const char* name, cudaStream_t stream) {
  std::lock_guard guard(state().lock);
  static std::map<std::string, Function> functions;
  Function& function = functions.try_emplace(name, name).first->second;
  return launch(&function, 1, 1, 0, stream) == cudaSuccess ? kSuccess : kExecutionFailed;
}

int product(const char* name, void* handle) { return product_on(name, static_cast<Handle*>(handle)->stream); }

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) { return *handle = new Handle, kSuccess; }
int cublasDestroy_v2(void* handle) { return delete static_cast<Handle*>(handle), kSuccess; }
int cublasSetStream_v2(void* handle, cudaStream_t stream) {
  return static_cast<Handle*>(handle)->stream = stream, kSuccess;
}
int cublasSetWorkspace_v2() { return kSuccess; }
int cublasSetMathMode() { return kSuccess; }
int cublasGetMathMode(void*, int* mode) { return *mode = 0, kSuccess; }
int cublasSetPointerMode_v2() { return kSuccess; }
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, kSuccess; }

int cublasSgemm_v2(void* handle) { return product("cublasSgemm", handle); }
int cublasDgemm_v2(void* handle) { return product("cublasDgemm", handle); }
int cublasGemmEx(void* handle) { return product("cublasGemmEx", handle); }
int cublasSgemmStridedBatched(void* handle) { return product("cublasSgemmStridedBatched", handle); }
int cublasDgemmStridedBatched(void* handle) { return product("cublasDgemmStridedBatched", handle); }
int cublasGemmStridedBatchedEx(void* handle) { return product("cublasGemmStridedBatchedEx", handle); }
int cublasSgemv_v2(void* handle) { return product("cublasSgemv", handle); }
int cublasDgemv_v2(void* handle) { return product("cublasDgemv", handle); }
int cublasSdot_v2(void* handle) { return product("cublasSdot", handle); }
int cublasDdot_v2(void* handle) { return product("cublasDdot", handle); }
int cublasDotEx(void* handle) { return product("cublasDotEx", handle); }

// cuBLASLt: its descriptions of a product need no GPU, so they are the real ones.
int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int, void* /* the first of them */, int* found) {
  return *found = 1, kSuccess;
}
int cublasLtMatmul(
    void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
    const void*, void*, std::size_t, cudaStream_t stream) {
  return product_on("cublasLtMatmul", stream);
}

}  // extern "C"
