// Fake CUDA runtime: memory, streams, events and graphs. Work is done when the call that submits it returns.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "device.h"
#include "last_error.h"

using namespace stand_in;

namespace {

const char* kind_of_copy(const void* to, const void* from) {
  if (device_of(to) < 0) return "download";
  return device_of(from) < 0 ? "upload" : "copy";
}

// Larger blocks are neither copied nor set: no kernel reads them, and touching their pages would take the machine's
// memory.
constexpr std::size_t kMoved = std::size_t{256} << 20;

/// memset. A large block of zeros is untouched pages, which take no memory.
void set(void* to, int value, std::size_t bytes) {
  constexpr std::size_t kPage = 4096;
  const bool aligned = reinterpret_cast<std::size_t>(to) % kPage == 0;
  const std::size_t pages = value == 0 && aligned ? bytes / kPage * kPage : 0;
  if (pages > 0) madvise(to, pages, MADV_DONTNEED);
  if (bytes - pages <= kMoved) std::memset(static_cast<char*>(to) + pages, value, bytes - pages);
}

Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }
Graph* graph_of(void* handle) { return static_cast<Graph*>(handle); }

}  // namespace

extern "C" {

// Memory.

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) { return remember(allocate(pointer, bytes)); }
cudaError_t cudaFree(void* pointer) { return remember(release(pointer)); }
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  std::lock_guard guard(state().lock);
  return *total = kMemory, *free = kMemory - state().used[current_device()], cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned) {
  std::lock_guard guard(state().lock);
  if (const cudaError_t error = unsafe("cudaHostAlloc")) return remember(error);
  *pointer = std::malloc(bytes);
  if (*pointer == nullptr) return remember(cudaErrorMemoryAllocation);
  own(*pointer, bytes, kPinned);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* pointer) {
  cudaHostUnregister(pointer);
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* pointer, std::size_t bytes, unsigned) {
  own(pointer, bytes, kPinned);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) {
  std::lock_guard guard(state().lock);
  state().blocks.erase(static_cast<char*>(pointer));
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const int device = device_of(pointer);
  *attributes = {};
  attributes->device = device < 0 ? current_device() : device;
  attributes->type = device >= 0         ? cudaMemoryTypeDevice
                     : device == kPinned ? cudaMemoryTypeHost
                                         : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  std::lock_guard guard(state().lock);
  const std::string kind = kind_of_copy(to, from);
  // CUDA copies pageable memory through a buffer of its own; the host waits for that.
  if (device_of(to) == kPageable || device_of(from) == kPageable) note("wait", "pageable memory", bytes);
  auto run = [=] {
    if (bytes <= kMoved) std::memmove(to, from, bytes);
  };
  return remember(submit(stream_of(stream), {{kind, "cudaMemcpyAsync", 0, 0, 0, 0, bytes}, run}));
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, std::size_t bytes, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  std::lock_guard guard(state().lock);
  if (const cudaError_t error = waits("cudaMemcpy", nullptr)) return remember(error);
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  std::lock_guard guard(state().lock);
  auto run = [=] { set(to, value, bytes); };
  return remember(submit(stream_of(stream), {{"fill", "cudaMemsetAsync", 0, 0, 0, 0, bytes}, run}));
}
cudaError_t cudaMemset(void* to, int value, std::size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }

// Streams.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int) {
  std::lock_guard guard(state().lock);
  const int number = static_cast<int>(state().streams.size()) + 1;
  state().streams.push_back(std::make_unique<Stream>(Stream{current_device(), number, flags}));
  *handle = reinterpret_cast<cudaStream_t>(state().streams.back().get());
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  std::lock_guard guard(state().lock);
  Graph* graph = stream_of(stream)->capture;
  if (graph == nullptr) return cudaSuccess;
  return remember(invalidate(graph, "cudaStreamQuery", cudaErrorStreamCaptureUnsupported));
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  std::lock_guard guard(state().lock);
  return remember(waits("cudaStreamSynchronize", stream_of(stream)));
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  std::lock_guard guard(state().lock);
  Stream* stream = stream_of(handle);
  Graph* capture = event_of(event)->capture;
  if (capture != nullptr && !capture->open) return remember(cudaErrorCapturedEvent);
  if (stream->capture != nullptr && stream->capture != capture) {
    return remember(invalidate(stream->capture, "cudaStreamWaitEvent", cudaErrorStreamCaptureIsolation));
  }
  if (capture == nullptr) return cudaSuccess;
  if (stream->number == 0) return remember(invalidate(capture, "cudaStreamWaitEvent", cudaErrorStreamCaptureImplicit));
  stream->capture = capture;  // a stream that waits for a captured one is captured with it
  auto& forked = capture->forked;
  if (stream == capture->origin) {
    forked.erase(std::remove(forked.begin(), forked.end(), event_of(event)->stream), forked.end());
  } else if (std::find(forked.begin(), forked.end(), stream) == forked.end()) {
    forked.push_back(stream);
  }
  return cudaSuccess;
}

// Events.

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
  std::lock_guard guard(state().lock);
  state().events.push_back(std::make_unique<Event>());
  *handle = reinterpret_cast<cudaEvent_t>(state().events.back().get());
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  std::lock_guard guard(state().lock);
  *event_of(event) = {stream_of(stream)->capture, stream_of(stream), state().submitted};
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  std::lock_guard guard(state().lock);
  return remember(event_of(event)->capture != nullptr ? cudaErrorCapturedEvent : unsafe("cudaEventQuery"));
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::lock_guard guard(state().lock);
  note("wait", "cudaEventSynchronize");
  return remember(event_of(event)->capture != nullptr ? cudaErrorCapturedEvent : unsafe("cudaEventSynchronize"));
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t last) {
  constexpr float kPiece = 0.1f;  // every piece of work takes the same time
  return *milliseconds = kPiece * static_cast<float>(event_of(last)->submitted - event_of(first)->submitted),
         cudaSuccess;
}

// Graphs.

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  std::lock_guard guard(state().lock);
  Stream* stream = stream_of(handle);
  if (stream->number == 0) return remember(cudaErrorStreamCaptureUnsupported);
  if (stream->capture != nullptr) return remember(cudaErrorIllegalState);
  const int number = static_cast<int>(state().graphs.size()) + 1;
  state().graphs.push_back(std::make_unique<Graph>(Graph{number, stream, mode, {}, {}}));
  stream->capture = state().graphs.back().get();
  state().captures.push_back(stream->capture);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* result) {
  std::lock_guard guard(state().lock);
  Graph* graph = stream_of(handle)->capture;
  if (graph == nullptr) return remember(cudaErrorIllegalState);
  if (stream_of(handle) != graph->origin) {
    return remember(invalidate(graph, "cudaStreamEndCapture", cudaErrorStreamCaptureUnmatched));
  }
  graph->open = false;
  state().captures.erase(std::find(state().captures.begin(), state().captures.end(), graph));
  for (auto& stream : state().streams) {
    if (stream->capture == graph) stream->capture = nullptr;
  }
  *result = nullptr;
  if (graph->invalid) return remember(cudaErrorStreamCaptureInvalidated);
  if (!graph->forked.empty()) {
    return remember(invalidate(graph, "cudaStreamEndCapture", cudaErrorStreamCaptureUnjoined));
  }
  *result = reinterpret_cast<cudaGraph_t>(graph);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges, std::size_t* count) {
  std::lock_guard guard(state().lock);
  Graph* capture = stream_of(handle)->capture;
  *status = capture == nullptr ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  if (id != nullptr && capture != nullptr) *id = static_cast<unsigned long long>(capture->number);
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(capture);
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, capture_mode()), cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  if (graph == nullptr) return remember(cudaErrorInvalidValue);
  *executable = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, std::size_t* count) {
  return *count = graph_of(graph)->nodes.size(), cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  std::lock_guard guard(state().lock);
  note("graph", "cudaGraphLaunch", graph_of(executable)->nodes.size());
  for (Work work : graph_of(executable)->nodes) {
    work.entry.when = "replayed";
    if (const cudaError_t error = submit(stream_of(stream), std::move(work))) return remember(error);
  }
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

}  // extern "C"
