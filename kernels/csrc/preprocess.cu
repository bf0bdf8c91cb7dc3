// The CUDA build of preprocess_core.h behind a plain C interface: pointers, sizes, a stream; no torch headers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "preprocess_core.h"

namespace vlscale {

constexpr int kBlocks = 8;  // on a multiprocessor: 128 registers a thread, the most blocks that compile without spills

struct StoreFloat {
  float* out;
  __device__ void operator()(int64_t place, float value) const { out[place] = value; }
};

struct StoreHalf {
  __half* out;
  __device__ void operator()(int64_t place, float value) const { out[place] = __float2half_rn(value); }
};

struct StoreBfloat {
  __nv_bfloat16* out;
  __device__ void operator()(int64_t place, float value) const { out[place] = __float2bfloat16_rn(value); }
};

template <bool Cubic, typename Store>
__global__ void __launch_bounds__(kThreads, kBlocks) preprocess_kernel(const Job job, const Store store) {
  __shared__ Block block;
  Thread own;
  const int thread = threadIdx.x;
  const Task task = find_task(job, blockIdx.x);
  if (task.valid) {  // the same for a whole block
    open_windows<Cubic>(job, task, thread, block, own);
    __syncthreads();
    for (int y = first_line(block); y < end_line(block); y += kChunk) {
      weigh_lines<Cubic>(block, y, thread);
      __syncthreads();
      add_lines<Cubic>(task, block, y, own);
      __syncthreads();
    }
  }
  store_outputs(job, task, thread, own, store);
}

template <typename Store>
cudaError_t launch(const Job& job, bool cubic, Store store, cudaStream_t stream) {
  const int64_t blocks = job.batch * blocks_down(job.size) * blocks_across(job.size);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (cubic)
    preprocess_kernel<true><<<(unsigned)blocks, kThreads, 0, stream>>>(job, store);
  else
    preprocess_kernel<false><<<(unsigned)blocks, kThreads, 0, stream>>>(job, store);
  return cudaGetLastError();
}

}  // namespace vlscale

// Enqueues on `stream` of `device`; pointers are the device's, but gain and bias (3,), which are read at once.
// dtype: 0 float32, 1 float16, 2 bfloat16. Returns 0 or a cudaError_t for vlscale_error.
extern "C" int vlscale_preprocess(int device, const uint8_t* pictures, int64_t bytes, const int64_t* offsets,
                                  const int64_t* sizes, const double* boxes, const uint8_t* flips, const float* colours,
                                  int64_t batch, int size, const float* gain, const float* bias, int cubic, int dtype,
                                  void* out, void* stream) {
  using namespace vlscale;
  const cudaError_t chosen = cudaSetDevice(device);
  if (chosen != cudaSuccess) return chosen;
  Job job = {pictures, bytes, offsets, sizes, boxes, flips, colours, batch, size, {}, {}};
  for (int colour = 0; colour < 3; ++colour) {
    job.gain[colour] = gain[colour];
    job.bias[colour] = bias[colour];
  }
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case 0:
      return launch(job, cubic, StoreFloat{static_cast<float*>(out)}, queue);
    case 1:
      return launch(job, cubic, StoreHalf{static_cast<__half*>(out)}, queue);
    case 2:
      return launch(job, cubic, StoreBfloat{static_cast<__nv_bfloat16*>(out)}, queue);
  }
  return cudaErrorInvalidValue;
}

extern "C" const char* vlscale_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
