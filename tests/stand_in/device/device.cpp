#include "device.h"

#include <sys/mman.h>

namespace stand_in {
namespace {

// CUDA refuses a launch above these.
constexpr unsigned kGridX = 2147483647u, kGridYZ = 65535u, kBlockXY = 1024u, kBlockZ = 64u, kThreads = 1024u;

bool fits(dim3 grid, dim3 block) {
  const bool some = grid.x > 0 && grid.y > 0 && grid.z > 0 && block.x > 0 && block.y > 0 && block.z > 0;
  return some && grid.x <= kGridX && grid.y <= kGridYZ && grid.z <= kGridYZ && block.x <= kBlockXY &&
         block.y <= kBlockXY && block.z <= kBlockZ && std::size_t{block.x} * block.y * block.z <= kThreads;
}

std::string shape(dim3 size) {
  return std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z);
}

std::string line(const Entry& entry) {
  return entry.kind + "\t" + entry.what + "\t" + std::to_string(entry.device) + "\t" + std::to_string(entry.stream) +
         "\t" + shape(entry.grid) + "\t" + shape(entry.block) + "\t" + std::to_string(entry.bytes) + "\t" + entry.when +
         "\n";
}

State* fresh() {
  auto* made = new State;
  for (int device = 0; device < kDevices; ++device) made->null_streams[device].device = device;
  return made;
}

}  // namespace

State& state() {
  static State* everything = fresh();  // never freed: libraries still call while the process ends
  return *everything;
}

int& current_device() {
  thread_local int device = 0;
  return device;
}

cudaStreamCaptureMode& capture_mode() {
  thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  return mode;
}

Stream* stream_of(cudaStream_t handle) {
  // 1 and 2 are the names of the legacy and of the per-thread null stream.
  if (reinterpret_cast<std::size_t>(handle) <= 2) return &state().null_streams[current_device()];
  return reinterpret_cast<Stream*>(handle);
}

void log(const Entry& entry) {
  if (state().logging) state().log.push_back(entry);
}

void note(std::string kind, std::string what, std::size_t bytes) {
  log({std::move(kind), std::move(what), current_device(), -1, 0, 0, bytes});
}

cudaError_t invalidate(Graph* graph, const char* call, cudaError_t error) {
  graph->invalid = true;
  note("fault", std::string(call) + " in a capture");
  return error;
}

cudaError_t waits(const char* call, Stream* stream) {
  note("wait", call);
  for (Graph* graph : state().captures) {
    const bool concerned = stream == nullptr ? graph->origin->device == current_device() : stream->capture == graph;
    if (concerned) return invalidate(graph, call, cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

cudaError_t unsafe(const char* call) {
  if (capture_mode() == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (Graph* graph : state().captures) {
    if (graph->mode != cudaStreamCaptureModeRelaxed) return invalidate(graph, call, cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

cudaError_t submit(Stream* stream, Work work) {
  if (stream->device != current_device()) return cudaErrorInvalidResourceHandle;
  work.entry.device = stream->device;
  work.entry.stream = stream->number;
  if (Graph* graph = stream->capture) {
    if (graph->invalid) return cudaErrorStreamCaptureInvalidated;
    work.entry.when = "captured";
    log(work.entry);
    graph->nodes.push_back(std::move(work));
    auto& forked = graph->forked;
    const bool counted = std::find(forked.begin(), forked.end(), stream) != forked.end();
    if (stream != graph->origin && !counted) forked.push_back(stream);
    return cudaSuccess;
  }
  for (Graph* graph : state().captures) {
    if (graph->origin->device != stream->device) continue;
    // The null stream waits for every blocking stream; that is impossible while one is captured.
    const bool blocking = (graph->origin->flags & cudaStreamNonBlocking) == 0;
    if (blocking && stream->number == 0) {
      return invalidate(graph, work.entry.what.c_str(), cudaErrorStreamCaptureImplicit);
    }
    note("fault", work.entry.what + " beside a capture");  // CUDA allows it, but the graph lacks it
  }
  log(work.entry);
  ++state().submitted;
  if (work.run) work.run();
  return cudaSuccess;
}

cudaError_t launch(Function* function, dim3 grid, dim3 block, std::size_t shared, cudaStream_t handle) {
  std::lock_guard guard(state().lock);
  if (function == nullptr) return cudaErrorInvalidDeviceFunction;
  if (!fits(grid, block) || shared > static_cast<std::size_t>(function->shared_limit[current_device()])) {
    note("fault", function->name + " with grid " + shape(grid) + " and block " + shape(block), shared);
    return cudaErrorInvalidConfiguration;
  }
  return submit(stream_of(handle), {{"launch", function->name, 0, 0, grid, block, shared}, nullptr});
}

cudaError_t allocate(void** pointer, std::size_t bytes) {
  std::lock_guard guard(state().lock);
  *pointer = nullptr;
  if (const cudaError_t error = unsafe("cudaMalloc")) return error;
  const int device = current_device();
  if (bytes == 0) return cudaSuccess;
  if (state().used[device] + bytes > kMemory) return cudaErrorMemoryAllocation;
  // An untouched page takes no memory, so any machine can reserve 80 GB.
  void* block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (block == MAP_FAILED) return cudaErrorMemoryAllocation;
  own(block, bytes, device);
  state().used[device] += bytes;
  note("allocate", "cudaMalloc", bytes);
  *pointer = block;
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  std::lock_guard guard(state().lock);
  if (pointer == nullptr) return cudaSuccess;
  if (const cudaError_t error = unsafe("cudaFree")) return error;
  const auto found = state().blocks.find(static_cast<char*>(pointer));
  if (found == state().blocks.end() || found->second.second < 0) return cudaErrorInvalidValue;
  note("wait", "cudaFree");  // for the whole GPU
  munmap(pointer, found->second.first);
  state().used[found->second.second] -= found->second.first;
  state().blocks.erase(found);
  return cudaSuccess;
}

int device_of(const void* pointer) {
  std::lock_guard guard(state().lock);
  const auto* address = static_cast<const char*>(pointer);
  auto after = state().blocks.upper_bound(address);
  if (after == state().blocks.begin()) return kPageable;
  const auto& [start, block] = *--after;
  return address < start + block.first ? block.second : kPageable;
}

void own(void* pointer, std::size_t bytes, int device) {
  std::lock_guard guard(state().lock);
  state().blocks[static_cast<char*>(pointer)] = {bytes, device};
}

int capability() {
  static const char* text = std::getenv("ANOMEM_STAND_IN_CAPABILITY");
  static const int value = text == nullptr ? 90 : std::atoi(text);
  return value;
}

namespace {

int shared_per_processor() {
  switch (capability()) {
    case 75: return 64 << 10;
    case 80: return 164 << 10;
    case 86:
    case 89:
    case 120: return 100 << 10;
    default: return 228 << 10;
  }
}

}  // namespace

int shared_opt_in() { return capability() == 75 ? 64 << 10 : shared_per_processor() - (1 << 10); }

int attribute(int which) {  // those of an H100 but for its capability, as far as torch and Triton ask
  const bool small = shared_per_processor() <= 100 << 10;
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: return capability() / 10;
    case cudaDevAttrComputeCapabilityMinor: return capability() % 10;
    case cudaDevAttrMultiProcessorCount: return kProcessors;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return kThreads;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return small ? 1536 : 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxBlockDimX: return kBlockXY;
    case cudaDevAttrMaxBlockDimY: return kBlockXY;
    case cudaDevAttrMaxBlockDimZ: return kBlockZ;
    case cudaDevAttrMaxGridDimX: return kGridX;
    case cudaDevAttrMaxGridDimY: return kGridYZ;
    case cudaDevAttrMaxGridDimZ: return kGridYZ;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlock: return kSharedBlock;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return shared_opt_in();
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return shared_per_processor();
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrClockRate: return 1980000;        // kHz
    case cudaDevAttrMemoryClockRate: return 2619000;  // kHz
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrCooperativeLaunch: return 1;
    default: return 0;
  }
}

}  // namespace stand_in

// Read by recording.py.

extern "C" const char* stand_in_log() {
  std::lock_guard guard(stand_in::state().lock);
  static std::string text;
  text.clear();
  for (const auto& entry : stand_in::state().log) text += stand_in::line(entry);
  return text.c_str();
}

/// Begins an empty log, or ends logging.
extern "C" void stand_in_record(int on) {
  std::lock_guard guard(stand_in::state().lock);
  stand_in::state().logging = on != 0;
  if (on != 0) stand_in::state().log.clear();
}
