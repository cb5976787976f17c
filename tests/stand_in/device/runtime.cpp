// Fake CUDA runtime: devices and kernels. Other calls reach the real runtime, which fails because the driver is fake.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <stack>
#include <utility>

#include "device.h"
#include "last_error.h"

using namespace stand_in;

namespace {

struct Configuration {
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
};
thread_local std::stack<Configuration> configurations;  // of kernel<<<…>>>(…), between its two halves

Function* function_of(const void* host) {
  std::lock_guard guard(state().lock);
  const auto found = state().registered.find(host);
  return found == state().registered.end() ? nullptr : found->second.get();
}

CUresult unsupported() { return CUDA_ERROR_NOT_SUPPORTED; }

}  // namespace

extern "C" {

// Kernels.

void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  std::lock_guard guard(state().lock);
  state().registered[host] = std::make_unique<Function>(name);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, void* stream) {
  configurations.push({grid, block, shared, static_cast<cudaStream_t>(stream)});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  const Configuration top = configurations.top();
  configurations.pop();
  *grid = top.grid, *block = top.block, *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(function_of(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void**, std::size_t shared, cudaStream_t stream) {
  return remember(launch(reinterpret_cast<Function*>(kernel), grid, block, shared, stream));
}
cudaError_t cudaLaunchKernel(
    const void* host, dim3 grid, dim3 block, void**, std::size_t shared, cudaStream_t stream) {
  return remember(launch(function_of(host), grid, block, shared, stream));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* host, void**) {
  return remember(launch(function_of(host), c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream));
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  attributes->maxDynamicSharedSizeBytes = kSharedBlock;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = capability();
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute which, int value) {
  Function* function = function_of(host);
  if (function == nullptr) return remember(cudaErrorInvalidDeviceFunction);
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > shared_opt_in()) return remember(cudaErrorInvalidValue);
    function->shared_limit[current_device()] = value;
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void*, int threads, std::size_t, unsigned) {
  return *blocks = attribute(cudaDevAttrMaxThreadsPerMultiProcessor) / threads, cudaSuccess;
}

// Devices.

cudaError_t cudaGetDeviceCount(int* count) { return *count = kDevices, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device(), cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return remember(cudaErrorInvalidDevice);
  return current_device() = device, cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(which), cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {};
  std::strcpy(properties->name, "stand-in for an H100");
  properties->uuid.bytes[0] = static_cast<char>(device + 1);
  properties->totalGlobalMem = kMemory;
  properties->major = attribute(cudaDevAttrComputeCapabilityMajor);
  properties->minor = attribute(cudaDevAttrComputeCapabilityMinor);
  properties->multiProcessorCount = kProcessors;
  properties->warpSize = attribute(cudaDevAttrWarpSize);
  properties->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  properties->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  properties->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  for (int axis = 0; axis < 3; ++axis) {
    properties->maxThreadsDim[axis] = attribute(cudaDevAttrMaxBlockDimX + axis);
    properties->maxGridSize[axis] = attribute(cudaDevAttrMaxGridDimX + axis);
  }
  properties->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
  properties->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  properties->sharedMemPerBlock = kSharedBlock;
  properties->sharedMemPerBlockOptin = shared_opt_in();
  properties->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  properties->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  properties->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  properties->unifiedAddressing = properties->concurrentKernels = properties->cooperativeLaunch = 1;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  std::snprintf(text, static_cast<std::size_t>(length), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  std::lock_guard guard(state().lock);
  return remember(waits("cudaDeviceSynchronize", nullptr));
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* symbol, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  // torch looks up all functions that it might call and fails if one is missing.
  if (*function == nullptr) *function = reinterpret_cast<void*>(&unsupported);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Errors.

cudaError_t cudaGetLastError() { return std::exchange(last_error(), cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error(); }
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration of a launch";
    case cudaErrorInvalidResourceHandle: return "a stream of another device";
    case cudaErrorStreamCaptureUnsupported: return "not permitted while a stream is captured";
    case cudaErrorStreamCaptureInvalidated: return "the capture has failed before";
    case cudaErrorStreamCaptureUnjoined: return "a stream of the capture was not waited for";
    case cudaErrorStreamCaptureUnmatched: return "the capture began on another stream";
    case cudaErrorCapturedEvent: return "an event of a capture";
    case cudaErrorStreamCaptureIsolation: return "a captured stream waits for work outside of the capture";
    case cudaErrorStreamCaptureImplicit: return "the null stream would wait for a captured stream";
    default: return "an error of the stand-in";
  }
}

}  // extern "C"
