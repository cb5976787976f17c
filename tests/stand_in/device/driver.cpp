// Fake CUDA driver, as far as the launchers of Triton and of torch.compile call it.
#include "device.h"

using namespace stand_in;

namespace {

CUresult driver_code(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return CUDA_SUCCESS;
    case cudaErrorInvalidResourceHandle: return CUDA_ERROR_INVALID_HANDLE;
    case cudaErrorStreamCaptureUnsupported: return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    case cudaErrorStreamCaptureInvalidated: return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    case cudaErrorStreamCaptureImplicit: return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = kDevices, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  return *value = attribute(which), CUDA_SUCCESS;  // numbered as the runtime's
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  return *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid value" : "an error of the stand-in", CUDA_SUCCESS;
}

// A context is identified by its device's null stream.
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = reinterpret_cast<CUcontext>(&state().null_streams[device]), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, current_device()); }
CUresult cuCtxSetCurrent(CUcontext context) {
  if (context != nullptr) current_device() = reinterpret_cast<Stream*>(context)->device;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(std::size_t* value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, std::size_t) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = current_device(), CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void*) {
  std::lock_guard guard(state().lock);
  static int only_one;  // a function is identified by its name alone
  *module = reinterpret_cast<CUmodule>(&only_one);
  return driver_code(unsafe("cuModuleLoadData"));
}
CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  std::lock_guard guard(state().lock);
  state().loaded.push_back(std::make_unique<Function>(name));
  return *function = reinterpret_cast<CUfunction>(state().loaded.back().get()), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  const int threads = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? attribute(cudaDevAttrMaxThreadsPerBlock) : 0;
  return *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : threads, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  const bool known = which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  if (!known || value > shared_opt_in()) return CUDA_ERROR_INVALID_VALUE;
  reinterpret_cast<Function*>(function)->shared_limit[current_device()] = value;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr pointer) {
  std::lock_guard guard(state().lock);
  if (which != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  const int device = device_of(reinterpret_cast<void*>(pointer));
  if (device < 0) return CUDA_ERROR_INVALID_VALUE;
  // Triton calls this for each tensor argument of a kernel.
  if (device != current_device()) note("fault", "memory of GPU " + std::to_string(device));
  return *static_cast<CUdeviceptr*>(value) = pointer, CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void**, void**) {
  const dim3 grid(c->gridDimX, c->gridDimY, c->gridDimZ), block(c->blockDimX, c->blockDimY, c->blockDimZ);
  auto* stream = reinterpret_cast<cudaStream_t>(c->hStream);
  return driver_code(launch(reinterpret_cast<Function*>(function), grid, block, c->sharedMemBytes, stream));
}
CUresult cuLaunchKernel(
    CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
    CUstream stream, void**, void**) {
  return driver_code(launch(
      reinterpret_cast<Function*>(function), dim3(gx, gy, gz), dim3(bx, by, bz), shared,
      reinterpret_cast<cudaStream_t>(stream)));
}

}  // extern "C"
