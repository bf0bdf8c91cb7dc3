// Packed uint8 pictures to a normalised batch: the program of one thread block, for a GPU and, word for word, for a CPU.
//
//   r[b, c, i, j] = clamp(sum_y sum_x wy(i, y) wx(j, x) picture_b[y, x, c], 0, 255)
//   out[b, c, i, j] = (clamp(sum_k M_b[c, k] r[b, k, i, j] + t_b[c], 0, 255) / 255 - mean_c) / std_c
//   w(i, y) = f((y + 1/2 - centre_i) / stretch) / sum of the same,  centre_i = start + (i + 1/2) scale,
//   scale = box side / S, stretch = max(scale, 1); f is the triangle, or Keys' cubic with a = -1/2 (as Pillow and torch).
//
// A block owns kRows x kThreads outputs of one picture: thread t one column of them. Source rows come by kChunk: a
// thread filters each along x in registers (a column weight is made once for kChunk rows, three colours), then adds it
// to its kRows outputs with row weights that the block made together. Any ratio of sizes works, nothing is stored
// between the two directions. When shrinking, with reach r (1 triangle, 2 cubic): a source pixel is read and multiplied
// 2r times across, (1 + 2r / kRows) times as often for the lines that neighbouring blocks share; a line of an output
// column then takes kRows multiplications a colour. Bytes of device memory: each source pixel once, each output once.
//
// B pictures; S output side; sides and places in source pixels. Positions are float64 (one product a window), so that
// weights are good to a few ulp however large the picture.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define VLSCALE_BOTH __host__ __device__ __forceinline__
#else
#define VLSCALE_BOTH inline
#endif

namespace vlscale {

constexpr int kThreads = 64;  // output columns of a block
constexpr int kRows = 8;      // output rows of a block
constexpr int kChunk = 8;     // source rows at a time
static_assert(kThreads == kRows * kChunk, "each thread makes one row weight of a chunk");

struct Job {
  const uint8_t* pictures;  // (bytes,) packed HWC RGB
  int64_t bytes;
  const int64_t* offsets;  // (B,) where each picture starts
  const int64_t* sizes;    // (B, 2) height, width
  const double* boxes;     // (B, 4) left, top, width, height
  const uint8_t* flips;    // (B,) nonzero: mirrored left to right
  const float* colours;    // (B, 3, 4) M | t, or null: as they are
  int64_t batch;
  int size;
  float gain[3];  // 1 / (255 std)
  float bias[3];  // -mean / std
};

// The taps of one output along one side: source pixels first .. first + count - 1.
struct Window {
  int first;
  int count;
  float shift;    // first + 1/2 - centre
  float inverse;  // 1 / stretch
  float norm;     // 1 / sum of the filter over the taps
};

struct Task {
  const uint8_t* pixels;
  int64_t picture;
  int height, width;
  double left, top, box_width, box_height;
  int row, column;  // the first of the block's outputs
  bool flip;
  bool valid;
};

struct Block {  // what the threads of a block share
  Window rows[kRows];
  float weights[kChunk][kRows];
};

struct Thread {
  Window column;
  float sums[kRows][3];
};

template <bool Cubic>
VLSCALE_BOTH float filter(float x) {
  x = fabsf(x);
  if (!Cubic) return fmaxf(1.0f - x, 0.0f);
  if (x < 1.0f) return (1.5f * x - 2.5f) * x * x + 1.0f;
  if (x < 2.0f) return ((-0.5f * x + 2.5f) * x - 4.0f) * x + 2.0f;
  return 0.0f;
}

template <bool Cubic>
VLSCALE_BOTH float weight(const Window& window, int tap) {
  return filter<Cubic>(((float)tap + window.shift) * window.inverse) * window.norm;
}

// Taps stay on the pixels that the box touches: a box of whole pixels reads nothing outside it.
template <bool Cubic>
VLSCALE_BOTH Window make_window(double start, double length, int pixels, int size, int output) {
  const double scale = length / size;
  const double stretch = scale > 1.0 ? scale : 1.0;
  const double reach = (Cubic ? 2.0 : 1.0) * stretch;
  const double centre = start + (output + 0.5) * scale;
  const double low = fmax(floor(start), floor(centre - reach + 0.5));
  const double high = fmin(fmin(ceil(start + length), (double)pixels), floor(centre + reach + 0.5));
  Window window;
  window.first = (int)low;
  window.count = (int)(high - low);
  window.shift = (float)(low + 0.5 - centre);
  window.inverse = (float)(1.0 / stretch);
  window.norm = 1.0f;
  float total = 0.0f;
  for (int tap = 0; tap < window.count; ++tap) total += weight<Cubic>(window, tap);
  window.norm = 1.0f / total;
  return window;
}

VLSCALE_BOTH bool fits(double start, double length, int pixels) {
  return start >= 0.0 && length > 0.0 && start < pixels && start + length <= pixels + 1e-3;
}

VLSCALE_BOTH int64_t blocks_down(int size) { return (size + kRows - 1) / kRows; }
VLSCALE_BOTH int64_t blocks_across(int size) { return (size + kThreads - 1) / kThreads; }

// Whether the picture's twelve numbers are finite: what is not, times 0, is not 0.
VLSCALE_BOTH bool finite(const float* map) {
  float sum = 0.0f;
  for (int place = 0; place < 12; ++place) sum += 0.0f * map[place];
  return sum == 0.0f;
}

// What block number `index` works on. A picture whose description is wrong is not valid: nothing of it is read.
VLSCALE_BOTH Task find_task(const Job& job, int64_t index) {
  const int64_t across = blocks_across(job.size), down = blocks_down(job.size);
  Task task;
  task.picture = index / (across * down);
  task.row = (int)(index / across % down) * kRows;
  task.column = (int)(index % across) * kThreads;
  const int64_t offset = job.offsets[task.picture];
  const int64_t height = job.sizes[2 * task.picture], width = job.sizes[2 * task.picture + 1];
  const double* box = job.boxes + 4 * task.picture;
  task.pixels = job.pictures + offset;
  task.height = (int)height;
  task.width = (int)width;
  task.left = box[0];
  task.top = box[1];
  task.box_width = box[2];
  task.box_height = box[3];
  task.flip = job.flips[task.picture] != 0;
  const int64_t most = 1 << 30;
  task.valid = height >= 1 && width >= 1 && height < most && width < most && offset >= 0 && offset <= job.bytes &&
               3 * height * width <= job.bytes - offset && fits(box[0], box[2], task.width) &&
               fits(box[1], box[3], task.height) &&
               (!job.colours || finite(job.colours + 12 * task.picture));
  return task;
}

VLSCALE_BOTH int at_most(int value, int limit) { return value < limit ? value : limit; }

// Windows of the block's rows and of this thread's column; outputs past the edge repeat the last one and are not stored.
template <bool Cubic>
VLSCALE_BOTH void open_windows(const Job& job, const Task& task, int thread, Block& block, Thread& own) {
  const int last = job.size - 1;
  if (thread < kRows)
    block.rows[thread] =
        make_window<Cubic>(task.top, task.box_height, task.height, job.size, at_most(task.row + thread, last));
  const int column = at_most(task.column + thread, last);
  own.column =
      make_window<Cubic>(task.left, task.box_width, task.width, job.size, task.flip ? last - column : column);
  for (int row = 0; row < kRows; ++row)
    for (int colour = 0; colour < 3; ++colour) own.sums[row][colour] = 0.0f;
}

VLSCALE_BOTH int first_line(const Block& block) { return block.rows[0].first; }
VLSCALE_BOTH int end_line(const Block& block) { return block.rows[kRows - 1].first + block.rows[kRows - 1].count; }

// Row weights of source lines y .. y + kChunk - 1, one a thread.
template <bool Cubic>
VLSCALE_BOTH void weigh_lines(Block& block, int y, int thread) {
  const int line = thread / kRows, row = thread % kRows;
  const Window& window = block.rows[row];
  const int tap = y + line - window.first;
  block.weights[line][row] = tap >= 0 && tap < window.count ? weight<Cubic>(window, tap) : 0.0f;
}

VLSCALE_BOTH float read(const uint8_t* pixel) {
#ifdef __CUDA_ARCH__
  return (float)__ldg(pixel);
#else
  return (float)*pixel;
#endif
}

// Adds source lines y .. y + kChunk - 1 to the thread's outputs; lines past the end are read as the last, weight 0.
template <bool Cubic>
VLSCALE_BOTH void add_lines(const Task& task, const Block& block, int y, Thread& own) {
  const int left = end_line(block) - y;
  const uint8_t* start = task.pixels + 3 * ((int64_t)y * task.width + own.column.first);
  float lines[kChunk][3] = {};
  for (int tap = 0; tap < own.column.count; ++tap) {
    const float across = weight<Cubic>(own.column, tap);
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int line = 0; line < kChunk; ++line) {
      const uint8_t* pixel = start + 3 * ((int64_t)at_most(line, left - 1) * task.width + tap);
      for (int colour = 0; colour < 3; ++colour) lines[line][colour] += across * read(pixel + colour);
    }
  }
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int line = 0; line < kChunk; ++line)
    for (int row = 0; row < kRows; ++row)
      for (int colour = 0; colour < 3; ++colour)
        own.sums[row][colour] += block.weights[line][row] * lines[line][colour];
}

VLSCALE_BOTH float clip(float level) { return fminf(fmaxf(level, 0.0f), 255.0f); }

template <typename Store>
VLSCALE_BOTH void store_outputs(const Job& job, const Task& task, int thread, const Thread& own, const Store& store) {
  const int column = task.column + thread;
  if (column >= job.size) return;
  const float* map = job.colours ? job.colours + 12 * task.picture : nullptr;
  for (int row = 0; row < kRows && task.row + row < job.size; ++row) {
    const float red = clip(own.sums[row][0]), green = clip(own.sums[row][1]), blue = clip(own.sums[row][2]);
    for (int colour = 0; colour < 3; ++colour) {
      float value = clip(own.sums[row][colour]);
      if (map) {
        const float* line = map + 4 * colour;
        value = clip(line[0] * red + line[1] * green + line[2] * blue + line[3]);
      }
      const int64_t place = ((3 * task.picture + colour) * job.size + task.row + row) * job.size + column;
      store(place, task.valid ? value * job.gain[colour] + job.bias[colour] : NAN);
    }
  }
}

}  // namespace vlscale
