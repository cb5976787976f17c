// Stand-in GPUs: their memory is the host's, their kernels add an entry to a log and compute nothing.
//
// Everything above CUDA is real: torch's CUDA tensors, allocator, streams and graphs, Triton's compiler and launcher, the
// package's own launches. Known refusals of CUDA are refused: grids, blocks and dynamic shared memory that are too large,
// too much memory, calls that a capture forbids.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace stand_in {

constexpr int kDevices = 2;
constexpr std::size_t kMemory = std::size_t{80} << 30;  // bytes of each GPU
constexpr int kProcessors = 132;
constexpr int kSharedBlock = 48 << 10;   // bytes of shared memory that a block has by default

/// One line of the log.
struct Entry {
  std::string kind;  // as in recording.py
  std::string what;  // a kernel's name, a call's name
  int device;
  int stream;
  dim3 grid, block;
  std::size_t bytes;
  std::string when = "now";  // or captured, replayed
};

/// Work for a GPU: its entry in the log and its effect on memory (a copy or a fill; a kernel has none).
struct Work {
  Entry entry;
  std::function<void()> run;
};

struct Stream;

/// A CUDA graph, while it is captured and after.
struct Graph {
  int number;
  Stream* origin;
  cudaStreamCaptureMode mode;
  std::vector<Work> nodes;
  std::vector<Stream*> forked;  // joined the capture and not waited for since their last work
  bool open = true;
  bool invalid = false;
};

struct Stream {
  int device = 0;
  int number = 0;      // 0: the device's null stream
  unsigned flags = 0;  // cudaStreamNonBlocking
  Graph* capture = nullptr;
};

struct Event {
  Graph* capture = nullptr;  // the capture that the event was recorded in
  Stream* stream = nullptr;  // where it was recorded
  long submitted = 0;        // pieces of work before it
};

struct Function {
  explicit Function(std::string named) : name(std::move(named)) { std::fill_n(shared_limit, kDevices, kSharedBlock); }
  std::string name;
  int shared_limit[kDevices];  // bytes of dynamic shared memory, on each GPU
};

/// The whole state, under one lock because torch runs backward passes in other threads.
struct State {
  std::recursive_mutex lock;
  std::vector<Entry> log;
  long submitted = 0;                                                     // pieces of work so far: the GPUs' clock
  std::map<const char*, std::pair<std::size_t, int>> blocks;              // address to bytes and device, -1: pinned
  std::size_t used[kDevices] = {};                                        // bytes
  Stream null_streams[kDevices];
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<std::unique_ptr<Event>> events;
  std::vector<std::unique_ptr<Graph>> graphs;
  std::vector<Graph*> captures;  // those that are open
  bool logging = false;
  std::map<const void*, std::unique_ptr<Function>> registered;  // by the host's function
  std::vector<std::unique_ptr<Function>> loaded;                // from modules
};

State& state();
/// The calling thread's GPU, and the calls that a capture forbids it.
int& current_device();
cudaStreamCaptureMode& capture_mode();

Stream* stream_of(cudaStream_t handle);
constexpr int kPinned = -1, kPageable = -2;
/// The GPU that an address belongs to, or which kind of the host's memory it is.
int device_of(const void* pointer);
/// An allocation of a GPU or of pinned memory.
void own(void* pointer, std::size_t bytes, int device);
int attribute(int which);
/// Compute capability times ten: of an H100, or from the environment variable ANOMEM_STAND_IN_CAPABILITY, such as 86.
int capability();
/// Bytes of shared memory that a block has at most, with cudaFuncSetAttribute.
int shared_opt_in();

void note(std::string kind, std::string what, std::size_t bytes = 0);
void log(const Entry& entry);
/// Ends a capture without a graph.
cudaError_t invalidate(Graph* graph, const char* call, cudaError_t error);
/// Result of a call that waits for a stream (nullptr: for the GPU); a capture forbids it.
cudaError_t waits(const char* call, Stream* stream);
/// Result of a call that a capture forbids in the thread's default mode, such as cudaMalloc.
cudaError_t unsafe(const char* call);

cudaError_t submit(Stream* stream, Work work);
cudaError_t launch(Function* function, dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream);
cudaError_t allocate(void** pointer, std::size_t bytes);
cudaError_t release(void* pointer);

}  // namespace stand_in
