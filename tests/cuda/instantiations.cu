// Every kernel in every dtype without torch, for nvcc to report its registers, spills and shared memory.
#include "cuda/entry.cuh"
#include "cuda/rows.cuh"
#include "cuda/scatter.cuh"
#include "cuda/softmax.cuh"
#include "cuda/take.cuh"
#include "cuda/sampling_variance.cuh"

namespace anomem::cuda {

#define ANOMEM_KERNEL(...) template __global__ void entry<__VA_ARGS__>(const __grid_constant__ __VA_ARGS__::Arguments)
#define ANOMEM_DTYPE(T)                      \
  ANOMEM_KERNEL(NormalizeBackward<T>);       \
  ANOMEM_KERNEL(RowDistance<T>);             \
  ANOMEM_KERNEL(RowDots<T>);                 \
  ANOMEM_KERNEL(ScatterPlanes<T>);           \
  ANOMEM_KERNEL(ScatterRows<T>);             \
  ANOMEM_KERNEL(Softmax<T, kBlock>);         \
  ANOMEM_KERNEL(Softmax<T, kWarp>);          \
  ANOMEM_KERNEL(SoftmaxBackward<T, kBlock>); \
  ANOMEM_KERNEL(SoftmaxBackward<T, kWarp>);  \
  ANOMEM_KERNEL(TakePlanes<T>);              \
  ANOMEM_KERNEL(TakeRows<T>);                \
  ANOMEM_KERNEL(VarianceBackward<T>);        \
  ANOMEM_KERNEL(VarianceMoments<T>)

ANOMEM_KERNEL(Accumulate);
ANOMEM_KERNEL(ListPositions);
ANOMEM_KERNEL(VarianceLoss);
ANOMEM_DTYPE(float);
ANOMEM_DTYPE(__nv_bfloat16);
ANOMEM_DTYPE(__half);

}  // namespace anomem::cuda
