// preprocess_core.h on a CPU, block by block and thread by thread, with the C interface of preprocess.cu and host
// pointers: it proves the kernel's indices and arithmetic where there is no GPU. float32 only.
#include <limits>
#include <vector>

#include "preprocess_core.h"

namespace vlscale {

struct StoreFloat {
  float* out;
  void operator()(int64_t place, float value) const { out[place] = value; }
};

// Loops over the threads stand where the kernel has its barriers.
template <bool Cubic>
void run_block(const Job& job, int64_t index, const StoreFloat& store) {
  Block block;
  std::vector<Thread> threads(kThreads);
  const Task task = find_task(job, index);
  if (task.valid) {
    for (int t = 0; t < kThreads; ++t) open_windows<Cubic>(job, task, t, block, threads[t]);
    for (int y = first_line(block); y < end_line(block); y += kChunk) {
      for (auto& line : block.weights)
        for (float& weight : line) weight = std::numeric_limits<float>::quiet_NaN();
      for (int t = 0; t < kThreads; ++t) weigh_lines<Cubic>(block, y, t);
      for (int t = 0; t < kThreads; ++t) add_lines<Cubic>(task, block, y, threads[t]);
    }
  }
  for (int t = 0; t < kThreads; ++t) store_outputs(job, task, t, threads[t], store);
}

}  // namespace vlscale

extern "C" int vlscale_preprocess(int, const uint8_t* pictures, int64_t bytes, const int64_t* offsets,
                                  const int64_t* sizes, const double* boxes, const uint8_t* flips, const float* colours,
                                  int64_t batch, int size, const float* gain, const float* bias, int cubic, int dtype,
                                  void* out, void*) {
  using namespace vlscale;
  if (dtype != 0) return 1;
  Job job = {pictures, bytes, offsets, sizes, boxes, flips, colours, batch, size, {}, {}};
  for (int colour = 0; colour < 3; ++colour) {
    job.gain[colour] = gain[colour];
    job.bias[colour] = bias[colour];
  }
  const StoreFloat store = {static_cast<float*>(out)};
  const int64_t blocks = batch * blocks_down(size) * blocks_across(size);
  for (int64_t index = 0; index < blocks; ++index) {
    if (cubic)
      run_block<true>(job, index, store);
    else
      run_block<false>(job, index, store);
  }
  return 0;
}

extern "C" const char* vlscale_error(int) { return "only float32 is built for a CPU"; }
