// One decoder layer's work on the CPU: norm, SwiGLU, attention over a paged cache, linear layers in bfloat16.
//
// What a row gets depends on its own sequence alone, bit for bit: not on the rows or sessions beside it, on how
// they are tiled, on the number of threads, on the blocks its cache lies in. Every sum is in float32 and in an
// order that the row alone fixes. Of attention only keys, values and results are rounded to the dtype: with
// turned queries and weights left in float32 the error in bfloat16 is that of rounding the exact result, half
// of what it is with both rounded. Knows nothing of torch, models or sessions' lives. Arrays are dense, in the
// order of their sizes; kernel.py, which declares these functions, checks that they are.

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <vector>

// ---- lanes -------------------------------------------------------------------------------------------------------

// Vectors of float32, and loads and stores of the three storage types.
//
// Products are fused where the level has FMA and nowhere else: by `fma`, never by the compiler's choice
// (-ffp-contract=off), so that a sum has the same bits in every loop that was unrolled or tiled differently.

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif
constexpr int LANES = VECTOR_BYTES / 4;

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Floats splat(float x) { return x - Floats{}; }

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

typedef int32_t Truths __attribute__((vector_size(VECTOR_BYTES)));  // of each lane: -1 or 0

inline bool any(Truths x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#else
  int32_t sum = 0;
  for (int i = 0; i < LANES; i++) sum |= x[i];
  return sum;
#endif
}

inline float horizontal_sum(Floats x) {
  float sum = x[0];
  for (int i = 1; i < LANES; i++) sum += x[i];
  return sum;
}

inline float horizontal_max(Floats x) {
  float most = x[0];
  for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
}

template <typename Vector>
inline Vector read(const void* from) {
  Vector x;
  memcpy(&x, from, sizeof x);
  return x;
}

inline Floats load(const float* from) { return read<Floats>(from); }
inline void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }

// GCC 12 makes several instructions of __builtin_convertvector where the two levels have one. The forms with
// a mask, here of all lanes, are those of its header that it does not warn of.
inline Words widened(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, read<__m256i>(from));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(read<__m128i>(from));
#else
  return __builtin_convertvector(read<Halves>(from), Words);
#endif
}
inline void store_low(uint16_t* to, Words x) {
  Halves low = __builtin_convertvector(x, Halves);
  memcpy(to, &low, sizeof low);
}

inline Floats load(const BFloat16* from) { return (Floats)(widened(&from->bits) << 16); }
// The upper half is x in bfloat16, ties to even.
inline Words nearest_bfloat16(Floats x) {
  Words bits = (Words)x;
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : Words{} + 0x7fc00000;
}
inline void store(BFloat16* to, Floats x) { store_low(&to->bits, nearest_bfloat16(x) >> 16); }

#if defined(__AVX512F__)
inline Floats load(const Float16* from) { return _mm512_maskz_cvtph_ps(0xffff, read<__m256i>(from)); }
inline void store(Float16* to, Floats x) {
  __m256i half = _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &half, sizeof half);
}
#elif defined(__AVX2__)
inline Floats load(const Float16* from) { return _mm256_cvtph_ps(read<__m128i>(from)); }
inline void store(Float16* to, Floats x) {
  __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &half, sizeof half);
}
#else
inline Floats load(const Float16* from) {
  Words half = widened(&from->bits), magnitude = (half & 0x7fff) << 13;
  Words value = (Words)((Floats)magnitude * 0x1p112f);  // moves the exponent; subnormals become normal
  value |= magnitude >= 0x0f800000u ? Words{} + 0x7f800000u : Words{};  // infinities and NaN
  return (Floats)(value | (half & 0x8000) << 16);
}
inline void store(Float16* to, Floats x) {
  Words bits = (Words)x, magnitude = bits & 0x7fffffff;
  Words normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;  // the addition rounds
  Words large = magnitude > 0x7f800000u ? Words{} + 0x7e00 : Words{} + 0x7c00;
  Words half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? large : half;
  store_low(&to->bits, half | ((bits >> 16) & 0x8000));
}
#endif

// The first n <= LANES elements; the other lanes are zero, and are not stored. The lanes that count take the
// same instructions as those of a whole vector, so that a row's end is computed like its middle.
template <typename T>
inline Floats load_some(const T* from, int64_t n) {
  if (n >= LANES) return load(from);
  T padded[LANES] = {};
  memcpy(padded, from, n * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store_some(T* to, Floats x, int64_t n) {
  if (n >= LANES) return store(to, x);
  T padded[LANES];
  store(padded, x);
  memcpy(to, padded, n * sizeof(T));
}

// x as it is after a store in T.
template <typename T>
inline Floats rounded(Floats x) {
  T stored[LANES];
  store(stored, x);
  return load(stored);
}
template <>
inline Floats rounded<float>(Floats x) {
  return x;
}
template <>
inline Floats rounded<BFloat16>(Floats x) {
  return (Floats)(nearest_bfloat16(x) & 0xffff0000u);
}

// e^x for x <= 0, within 2 units in the last place; exactly 0 below -87.
inline Floats exp_negative(Floats x) {
  const Floats magic = splat(0x1.8p23f);  // adding it rounds to an integer
  Floats n = fma(x, splat(1.44269504f), magic) - magic;
  Floats r = fma(n, splat(-0.693359375f), x);  // ln 2 in two parts, the first with few bits: exact
  r = fma(n, splat(2.1219444e-4f), r);
  // e^r = 1 + r + r^2 p(r), minimax over |r| <= ln 2 / 2: 3.1e-9 relative.
  Floats p = splat(1.3820946e-3f);
  p = fma(p, r, splat(8.368684e-3f));
  p = fma(p, r, splat(4.1668266e-2f));
  p = fma(p, r, splat(1.6666521e-1f));
  p = fma(p, r, splat(4.9999994e-1f));
  p = fma(fma(p, r, splat(1.0f)), r, splat(1.0f));
  Words power = (Words)(n + magic) - (Words)magic;  // the integer itself, in the low bits
  Floats y = p * (Floats)((power + 127) << 23);
  return x < -87.0f ? Floats{} : y;
}

// ---- threads -----------------------------------------------------------------------------------------------------

// A team of threads of our own. OpenMP waits at the end of a region for every thread of its team, also for one
// that has no work and that the system has set aside for another process: beside one busy program a step took ten
// times as long. Here whoever comes takes the next piece, and only pieces under way are waited for.

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  // work(data, i) for every i below count, by the caller and up to threads - 1 others. One caller at a time: a
  // second one works alone.
  void run(int threads, int64_t pieces, void (*what)(const void*, int64_t), const void* with) {
    if (!caller.try_lock()) {
      for (int64_t i = 0; i < pieces; i++) what(with, i);
      return;
    }
    grow(threads - 1);
    work = what, data = with, count = pieces;
    done.store(0);
    helping.store(threads - 1);
    left.store(pieces);
    if (asleep.load() > 0) {
      std::lock_guard<std::mutex> hold(bed);
      wake.notify_all();
    }
    while (take()) {
    }
    for (int spins = 1; done.load() != pieces; spins++) pause(spins);
    caller.unlock();
  }

 private:
  static constexpr int MOST = 256, SPINS = 1 << 14, YIELD_AFTER = 1 << 6;  // about 0.2 ms, and 1 us

  std::mutex caller, bed;
  std::condition_variable wake;
  std::atomic<int64_t> left{0}, done{0};  // pieces that nobody has taken, and that are finished
  std::atomic<int> helping{0}, asleep{0};
  int members = 0;
  // What the pieces are of. It changes only when none is left or under way, so whoever takes one reads its own.
  void (*work)(const void*, int64_t) = nullptr;
  const void* data = nullptr;
  int64_t count = 0;

  // Whoever else wants to run does.
  static void pause(int spins) { spins % YIELD_AFTER ? relax() : void(sched_yield()); }

  bool take() {
    int64_t n = left.load();
    while (n > 0 && !left.compare_exchange_weak(n, n - 1)) {
    }
    if (n <= 0) return false;
    work(data, count - n);
    done.fetch_add(1);
    return true;
  }

  // Where the system gives no more threads there are fewer; the caller comes through alone, too.
  void grow(int wanted) {
    for (; members < std::min(wanted, MOST); members++) {
      auto* self = new Member{this, members};
      pthread_t thread;
      if (pthread_create(&thread, nullptr, &serve, self)) {
        delete self;
        return;
      }
      pthread_detach(thread);
    }
  }

  struct Member {
    Team* team;
    int number;
  };

  // Until the process ends.
  static void* serve(void* started) {
    Member self = *static_cast<Member*>(started);
    delete static_cast<Member*>(started);
    for (;;) self.team->help(self.number);
    return nullptr;
  }

  void help(int number) {
    for (int spins = 0; spins < SPINS; spins++) {
      if (number < helping.load() && take()) spins = 0;
      pause(spins);
    }
    std::unique_lock<std::mutex> hold(bed);
    asleep++;
    if (left.load() == 0) wake.wait(hold);
    asleep--;
  }
};

// Never destroyed: its members live as long as the process.
inline Team& team() {
  static Team& only = *new Team;
  return only;
}

template <typename Work>
void each(int threads, int64_t count, const Work& work) {
  if (threads < 2 || count < 2) {
    for (int64_t i = 0; i < count; i++) work(i);
    return;
  }
  auto piece = [](const void* data, int64_t i) { (*static_cast<const Work*>(data))(i); };
  team().run(std::min<int64_t>(threads, count), count, piece, &work);
}

// As `each`, but a thread goes through neighbours, as far as others leave it them, so that what it reads is one
// stretch of memory: processors fetch ahead in such, and no thread what another one reads next.
template <typename Work>
void each_in_runs(int threads, int64_t count, const Work& work) {
  constexpr int64_t MOST_RUNS = 64;
  struct alignas(64) Run {
    std::atomic<int64_t> next;
  };
  const int64_t runs = std::min({int64_t(threads), count, MOST_RUNS});
  if (runs < 2) return each(1, count, work);
  Run found[MOST_RUNS];
  auto begin = [&](int64_t run) { return count * run / runs; };
  for (int64_t run = 0; run < runs; run++) found[run].next.store(begin(run));
  each(threads, threads, [&](int64_t thread) {
    for (int64_t turn = 0; turn < runs; turn++) {
      const int64_t run = (thread + turn) % runs, end = begin(run + 1);
      for (int64_t i; (i = found[run].next.fetch_add(1)) < end;) work(i);
    }
  });
}

// ---- sequences ---------------------------------------------------------------------------------------------------

// Whose rows a forward has and where their keys and values lie: sessions, paths, blocks.

constexpr int BLOCK = 64;  // positions of a block of the cache

// One layer: pools of blocks, in the layer's dtype. Mirrored in kernel.py.
struct Layer {
  void* keys;          // [blocks, kv_heads, head_dim, 64]: keys side by side, scores need no horizontal sum
  void* values;        // [blocks, kv_heads, 64, head_dim]
  const void* q_norm;  // [head_dim], or null: no norm
  const void* k_norm;
  int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int32_t blocks, heads, kv_heads, head_dim;
  float scale, eps;
};

// The rows of one forward, packed by session. A session's new rows follow those of its region that are there
// already: row r lies at place committed + region + r - starts[s] of its table. Mirrored in kernel.py.
struct Step {
  const int32_t* table;      // [sessions, max_blocks] where a sequence's blocks lie in the pools
  const int32_t* committed;  // [sessions] positions before the region
  const int32_t* region;     // [sessions] rows of the region from earlier steps
  const int32_t* starts;     // [sessions + 1] a session's rows are starts[s] .. starts[s + 1]
  const int32_t* path_ptr;   // [rows + 1] a row's path is path_idx[path_ptr[r]] .. path_idx[path_ptr[r + 1]]
  const int32_t* path_idx;   // [paths] offsets in the region, ancestors first, the row itself last
  const int32_t* chain;      // [sessions] 1: each region row follows the one before, paths are not looked at
  const float* cos;          // [rows, rotary / 2] at the row's position
  const float* sin;
  int32_t sessions, max_blocks, rows, paths;
  int32_t rotary;  // elements of a head that rope turns, from the first; 0: none
};

// In the order of kernel.py's sentences.
enum Fault { NONE, ROTARY, STARTS, NEGATIVE, TABLE_FULL, NO_SUCH_BLOCK, PATH };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const int32_t* table_of(const Step& step, int session) {
  return step.table + int64_t(session) * step.max_blocks;
}

inline bool is_path(const Step& step, int row, int itself) {
  int first = step.path_ptr[row], end = step.path_ptr[row + 1];
  if (first < 0 || first >= end || end > step.paths || step.path_idx[first] < 0) return false;
  for (int i = first + 1; i < end; i++)
    if (step.path_idx[i] <= step.path_idx[i - 1]) return false;
  return step.path_idx[end - 1] == itself;
}

inline Fault find_fault(const Step& step, const Layer& layer) {
  if (step.rotary > layer.head_dim) return ROTARY;
  if (step.starts[0] != 0 || step.starts[step.sessions] != step.rows) return STARTS;
  for (int s = 0; s < step.sessions; s++)
    if (step.starts[s] > step.starts[s + 1]) return STARTS;
  for (int s = 0; s < step.sessions; s++) {
    const int start = step.starts[s], rows = step.starts[s + 1] - start;
    if (rows == 0) continue;
    if (step.committed[s] < 0 || step.region[s] < 0) return NEGATIVE;
    const int64_t places = int64_t(step.committed[s]) + step.region[s] + rows;
    if (places > int64_t(step.max_blocks) * BLOCK) return TABLE_FULL;
    for (int64_t b = 0; b < ceil_div(places, BLOCK); b++) {
      int block = table_of(step, s)[b];
      if (block < 0 || block >= layer.blocks) return NO_SUCH_BLOCK;
    }
    if (step.chain[s]) continue;
    for (int r = 0; r < rows; r++)
      if (!is_path(step, start + r, step.region[s] + r)) return PATH;
  }
  return NONE;
}

// Where the positions of one row's sequence lie: the committed prefix, then the row's path in the region.
struct Sequence {
  int committed, length;
  const int32_t* path;  // null: a chain

  int place(int position) const {
    return position < committed || !path ? position : committed + path[position - committed];
  }
  // How many positions from `position`, below `end`, lie side by side in one block.
  int run(int position, int end) const {
    int first = place(position), longest = std::min(end - position, BLOCK - first % BLOCK), n = 1;
    if (!path) return longest;
    if (position < committed) return std::min(longest, committed - position);
    while (n < longest && place(position + n) == first + n) n++;
    return n;
  }
};

inline Sequence sequence_of(const Step& step, int session, int row) {
  int committed = step.committed[session];
  if (step.chain[session])
    return {committed, committed + step.region[session] + row - step.starts[session] + 1, nullptr};
  int first = step.path_ptr[row];
  return {committed, committed + step.path_ptr[row + 1] - first, step.path_idx + first};
}

// ---- rows --------------------------------------------------------------------------------------------------------

// Norm and SwiGLU of one row, in the roundings of transformers' Llama.

// x += added, rounded to T: the residual stream as torch adds to it.
template <typename T>
void add_row(T* x, const T* added, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    Floats sum = load_some(x + i, n - i) + load_some(added + i, n - i);
    store_some(x + i, sum, n - i);
  }
}

// LlamaRMSNorm: x / sqrt(mean(x^2) + eps) rounded to T, then times weight and rounded again.
template <typename T>
void norm_row(const T* x, const T* weight, T* out, int64_t n, float eps) {
  Floats sums[4] = {};
  for (int64_t i = 0; i < n; i += LANES) {
    Floats v = load_some(x + i, n - i);
    Floats& sum = sums[i / LANES % 4];
    sum = fma(v, v, sum);
  }
  float mean = horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / n;
  Floats inverse = splat(1.0f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < n; i += LANES) {
    Floats v = rounded<T>(load_some(x + i, n - i) * inverse);
    store_some(out + i, v * load_some(weight + i, n - i), n - i);
  }
}

// silu(gate) rounded to T, times up, rounded again: F.silu(gate) * up.
template <typename T>
void swiglu_row(const T* gate, const T* up, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    Floats g = load_some(gate + i, n - i);
    Floats e = exp_negative(g < 0 ? g : -g);
    Floats silu = g * (g < 0 ? e : splat(1.0f)) / (1.0f + e);
    store_some(out + i, rounded<T>(silu) * load_some(up + i, n - i), n - i);
  }
}

// ---- panels ------------------------------------------------------------------------------------------------------

// The dense pieces of attention over one block. Q queries go at once; a query's sums do not depend on Q, nor on
// which lanes or columns are beside one another.

constexpr int MICRO = 6;  // queries that one pass over keys or values serves at once

// Vectors beside one another: as many as three quarters of the registers hold sums for.
constexpr int panel(int queries) {
  int vectors = BLOCK / LANES;
  while (vectors * queries > REGISTERS * 3 / 4) vectors /= 2;
  return vectors;
}

// queries [Q, d] . keys [d, 64] -> scores [Q, lanes] in rows of `ld`; each a sum over d in order.
template <int Q, int N, typename K>
void score_panel(const float* queries, int d, const K* keys, int lanes, int lane, float* scores, int64_t ld) {
  for (; lane + N * LANES <= lanes; lane += N * LANES) {
    Floats sums[Q][N] = {};
    for (int i = 0; i < d; i++) {
      Floats key[N];
      for (int n = 0; n < N; n++) key[n] = load(keys + i * BLOCK + lane + n * LANES);
      for (int q = 0; q < Q; q++) {
        Floats x = splat(queries[q * d + i]);
        for (int n = 0; n < N; n++) sums[q][n] = fma(x, key[n], sums[q][n]);
      }
    }
    for (int q = 0; q < Q; q++)
      for (int n = 0; n < N; n++) store(scores + q * ld + lane + n * LANES, sums[q][n]);
  }
  if constexpr (N > 1)
    if (lane < lanes) score_panel<Q, N / 2>(queries, d, keys, lanes, lane, scores, ld);
}

// sums [Q, d] += weights [Q, count] (rows of `ld`) . values [count, d]; one position after the other.
template <int Q, int N, typename V>
void value_panel(const float* weights, int64_t ld, const V* values, int count, int d, int column, float* out) {
  for (; column + N * LANES <= d; column += N * LANES) {
    Floats sums[Q][N];
    for (int q = 0; q < Q; q++)
      for (int n = 0; n < N; n++) sums[q][n] = load(out + q * d + column + n * LANES);
    for (int j = 0; j < count; j++) {
      Floats value[N];
      for (int n = 0; n < N; n++) value[n] = load(values + j * d + column + n * LANES);
      for (int q = 0; q < Q; q++) {
        Floats w = splat(weights[q * ld + j]);
        for (int n = 0; n < N; n++) sums[q][n] = fma(w, value[n], sums[q][n]);
      }
    }
    for (int q = 0; q < Q; q++)
      for (int n = 0; n < N; n++) store(out + q * d + column + n * LANES, sums[q][n]);
  }
  if constexpr (N > 1)
    if (column < d) value_panel<Q, N / 2>(weights, ld, values, count, d, column, out);
}

template <typename K, int Q = MICRO>
void score_micro(int q, const float* queries, int d, const K* keys, int lanes, float* scores, int64_t ld) {
  if (q == Q) return score_panel<Q, panel(Q)>(queries, d, keys, lanes, 0, scores, ld);
  if constexpr (Q > 1) score_micro<K, Q - 1>(q, queries, d, keys, lanes, scores, ld);
}

template <typename V, int Q = MICRO>
void value_micro(int q, const float* weights, int64_t ld, const V* values, int count, int d, float* out) {
  if (q == Q) return value_panel<Q, panel(Q)>(weights, ld, values, count, d, 0, out);
  if constexpr (Q > 1) value_micro<V, Q - 1>(q, weights, ld, values, count, d, out);
}

inline int micro_share(int left) { return ceil_div(left, ceil_div(left, MICRO)); }

template <typename K>
void add_scores(int queries, const float* q, int d, const K* keys, int lanes, float* scores, int64_t ld) {
  for (int first = 0, n; first < queries; first += n) {
    n = micro_share(queries - first);
    score_micro(n, q + first * d, d, keys, lanes, scores + first * ld, ld);
  }
}

template <typename V>
void add_values(int queries, const float* weights, int64_t ld, const V* values, int count, int d, float* out) {
  for (int first = 0, n; first < queries; first += n) {
    n = micro_share(queries - first);
    value_micro(n, weights + first * ld, ld, values, count, d, out + first * d);
  }
}

// x [len] becomes e^(x - max), the lanes after it 0; returns 1 / sum. A position adds to lane position % LANES.
inline float softmax(float* x, int len) {
  int whole = ceil_div(len, LANES) * LANES;
  for (int i = len; i < whole; i++) x[i] = -INFINITY;
  Floats most = splat(-INFINITY);
  for (int i = 0; i < whole; i += LANES) most = load(x + i) > most ? load(x + i) : most;
  Floats top = splat(horizontal_max(most)), sum = {};
  for (int i = 0; i < whole; i += LANES) {
    Floats e = exp_negative(load(x + i) - top);
    store(x + i, e);
    sum += e;
  }
  return 1.0f / horizontal_sum(sum);
}

// ---- attention ---------------------------------------------------------------------------------------------------

// Attention of one layer: rope, cache write, scores, softmax and values, over pages, chains and trees.

constexpr int MAX_HEAD = 256;         // head_dim
constexpr int TILE_QUERIES = 24;      // queries of one task
constexpr int TILE_SCORES = 1 << 16;  // floats of one task's scores: they stay in a second-level cache

// A head's row [d] of T, normed where the model does, turned at its position, in float32. Elements from
// `rotary` on are not turned.
template <typename T>
void turned(const T* head, const void* norm, const Layer& layer, const Step& step, int row, float* out) {
  alignas(64) T normed[MAX_HEAD];
  const int d = layer.head_dim, half = step.rotary / 2;
  if (norm) {
    norm_row(head, static_cast<const T*>(norm), normed, d, layer.eps);
    head = normed;
  }
  alignas(64) float x[MAX_HEAD];
  for (int i = 0; i < d; i += LANES) store(x + i, load(head + i));
  const float *cos = step.cos + int64_t(row) * half, *sin = step.sin + int64_t(row) * half;
  for (int i = 0; i < half; i++) out[i] = x[i] * cos[i] - x[i + half] * sin[i];
  for (int i = 0; i < half; i++) out[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  for (int i = 2 * half; i < d; i++) out[i] = x[i];
}

// Rows of one session that a task treats together.
struct Tile {
  const int32_t* table;
  int session, first, rows;
  int span;    // places that hold all their keys
  int shared;  // positions that all of them see, and that lie in order
};

inline void add_tiles(const Step& step, const Layer& layer, int threads, int s, std::vector<Tile>& tiles) {
  const int32_t* table = table_of(step, s);
  const int start = step.starts[s], end = step.starts[s + 1], group = layer.heads / layer.kv_heads;
  const int before = step.committed[s] + step.region[s];
  const int64_t most = std::min<int64_t>(TILE_QUERIES, TILE_SCORES / (before + end - start + BLOCK));
  const int64_t balanced = int64_t(step.rows) * layer.heads / (4 * threads);  // so that no thread waits long
  const int rows = std::max<int64_t>(1, std::min(most, std::max<int64_t>(MICRO, balanced)) / group);
  for (int first = start; first < end; first += rows) {
    int n = std::min(rows, end - first), offset = first - start;
    int shared = step.chain[s] ? before + offset : step.committed[s];
    tiles.push_back({table, s, first, n, before + offset + n, shared});
  }
}

template <typename T>
T* block_of(void* pool, const Layer& layer, const int32_t* table, int place, int head) {
  int64_t block = int64_t(table[place / BLOCK]) * layer.kv_heads + head;
  return static_cast<T*>(pool) + block * BLOCK * layer.head_dim;
}

template <typename T>
void write_row(const Step& step, const Layer& layer, int session, int row, const T* qkv) {
  const int d = layer.head_dim;
  const int32_t* table = table_of(step, session);
  const int place = step.committed[session] + step.region[session] + row - step.starts[session];
  const T* heads = qkv + (int64_t(row) * (layer.heads + 2 * layer.kv_heads) + layer.heads) * d;
  alignas(64) float key[MAX_HEAD];
  alignas(64) T stored[MAX_HEAD];
  for (int head = 0; head < layer.kv_heads; head++) {
    turned(heads + head * d, layer.k_norm, layer, step, row, key);
    for (int i = 0; i < d; i += LANES) store(stored + i, load(key + i));
    T* keys = block_of<T>(layer.keys, layer, table, place, head) + place % BLOCK;
    for (int i = 0; i < d; i++) keys[i * BLOCK] = stored[i];
    T* values = block_of<T>(layer.values, layer, table, place, head) + place % BLOCK * d;
    memcpy(values, heads + (layer.kv_heads + head) * d, d * sizeof(T));
  }
}

// At least so many floats of the calling thread, aligned; the next call takes them back.
inline float* scratch(int64_t floats) {
  struct alignas(64) Line {
    float elements[16];
  };
  thread_local std::vector<Line> lines;
  if (lines.size() < size_t(ceil_div(floats, 16))) lines.resize(ceil_div(floats, 16));
  return lines[0].elements;
}

// The rows of one tile and the query heads of one KV head.
template <typename T>
class Task {
 public:
  Task(const Step& step, const Layer& layer, const Tile& tile, int head)
      : step(step), layer(layer), tile(tile), head(head), d(layer.head_dim),
        group(layer.heads / layer.kv_heads), queries(tile.rows * group),
        ld(ceil_div(tile.span, BLOCK) * BLOCK) {
    q = scratch(queries * (2 * d + ld + 1));
    sums = q + queries * d;
    scores = sums + queries * d;
    inverse = scores + queries * ld;
  }

  void run(const T* qkv, T* out) {
    prefetch(keys_at(0));
    read_queries(qkv);
    score_places();
    for (int r = 0; r < tile.rows; r++) weigh_positions(r);
    std::fill(sums, sums + queries * d, 0.0f);
    sum_values(sequence(0), 0, tile.shared, 0, queries);
    for (int r = 0; r < tile.rows; r++)
      sum_values(sequence(r), tile.shared, sequence(r).length, r * group, group);
    for (int i = 0; i < queries; i++) write(i, out);
  }

 private:
  const Step& step;
  const Layer& layer;
  const Tile& tile;
  const int head, d, group, queries;
  const int64_t ld;  // places, in whole blocks
  float* q;        // [queries, d] row by row, turned and scaled
  float* sums;     // [queries, d]
  float* scores;   // [queries, ld] by place, then weights by position
  float* inverse;  // [queries] 1 / sum of the weights

  Sequence sequence(int r) const { return sequence_of(step, tile.session, tile.first + r); }
  int64_t query_head(int i) const { return head * group + i % group; }
  const T* keys_at(int place) const { return block_of<T>(layer.keys, layer, tile.table, place, head); }
  const T* values_at(int place) const { return block_of<T>(layer.values, layer, tile.table, place, head); }

  // A block on its way while another is computed with: 4 to 12 % of a call whose cache lies in memory.
  void prefetch(const T* block) const {
    const char* line = reinterpret_cast<const char*>(block);
    for (int64_t i = 0; i < int64_t(BLOCK * d * sizeof(T)); i += 64) __builtin_prefetch(line + i, 0, 2);
  }

  void read_queries(const T* qkv) {
    for (int i = 0; i < queries; i++) {
      int row = tile.first + i / group;
      int64_t at = int64_t(row) * (layer.heads + 2 * layer.kv_heads) + query_head(i);
      turned(qkv + at * d, layer.q_norm, layer, step, row, q + i * d);
      for (int j = 0; j < d; j++) q[i * d + j] *= layer.scale;
    }
  }

  // Of every place up to the tile's last row, whoever's it is: lanes do not touch one another.
  void score_places() {
    for (int place = 0; place < tile.span; place += BLOCK) {
      prefetch(place + BLOCK < tile.span ? keys_at(place + BLOCK) : values_at(0));
      const int lanes = std::min<int>(BLOCK, ceil_div(tile.span - place, LANES) * LANES);
      add_scores(queries, q, d, keys_at(place), lanes, scores + place, ld);
    }
  }

  // Row r's scores from the order of places to that of its positions, and to weights. A path ascends, so a
  // score is moved before another takes its place.
  void weigh_positions(int r) {
    Sequence own = sequence(r);
    for (int i = r * group; i < (r + 1) * group; i++) {
      float* x = scores + i * ld;
      if (own.path)
        for (int j = own.committed; j < own.length; j++) x[j] = x[own.place(j)];
      inverse[i] = softmax(x, own.length);
    }
  }

  // Queries first .. first + count take the values of positions from .. to of a sequence.
  void sum_values(const Sequence& own, int from, int to, int first, int count) {
    const float* weights = scores + first * ld;
    for (int n; from < to; from += n) {
      n = own.run(from, to);
      int place = own.place(from);
      const T* values = values_at(place) + place % BLOCK * d;
      if (from + n < tile.shared) prefetch(values_at(from + n));
      add_values(count, weights + from, ld, values, n, d, sums + first * d);
    }
  }

  void write(int i, T* out) const {
    T* to = out + (int64_t(tile.first + i / group) * layer.heads + query_head(i)) * d;
    for (int j = 0; j < d; j += LANES) store(to + j, load(sums + i * d + j) * inverse[i]);
  }
};

template <typename T>
void attend(const Step& step, const Layer& layer, const T* qkv, T* out, int threads) {
  thread_local std::vector<Tile> reused;
  reused.clear();
  for (int s = 0; s < step.sessions; s++) add_tiles(step, layer, threads, s, reused);
  // The longest first, so that none is left over at the end.
  std::stable_sort(reused.begin(), reused.end(), [](const Tile& a, const Tile& b) { return a.span > b.span; });
  const std::vector<Tile>& tiles = reused;  // of this thread, for all of them
  // All keys before any score: the rows of a session see one another. A few rows are not worth a region.
  each(step.rows > 8 ? threads : 1, tiles.size(), [&](int64_t i) {
    for (int r = 0; r < tiles[i].rows; r++) write_row(step, layer, tiles[i].session, tiles[i].first + r, qkv);
  });
  each(threads, int64_t(tiles.size()) * layer.kv_heads, [&](int64_t i) {
    Task<T>(step, layer, tiles[i / layer.kv_heads], i % layer.kv_heads).run(qkv, out);
  });
}

// Rows in pieces of about 4,096 elements: smaller ones are done before another thread has begun.
template <typename Work>
void each_row(int64_t rows, int64_t width, int threads, const Work& work) {
  int64_t piece = std::max<int64_t>(1, 4096 / width);
  each(threads, ceil_div(rows, piece), [&](int64_t i) {
    for (int64_t r = i * piece; r < std::min(rows, (i + 1) * piece); r++) work(r);
  });
}

// ---- linear layers -----------------------------------------------------------------------------------------------

// In bfloat16. Each output is one chain of products in order of the inputs, in a register of its own, however many
// rows are tiled together. Small steps read weights as fast as memory gives them; libraries reach half of that.

// Mirrored in layers.py.
struct Linear {
  const BFloat16* weights;  // [blocks, padded inputs / 2, columns, 2]; filled up with zeros
  const float* bias;        // [blocks * columns]
  int64_t inputs, outputs;
};

constexpr int COLUMNS = 2 * LANES;  // of a block
constexpr int AHEAD = 4096;         // bytes of weights that are on their way

#if defined(__AMX_BF16__)
constexpr int TILE = 16, LINEAR_ROWS = 2 * TILE, INPUTS = 32;  // a tile of the processor: 16 rows of 64 bytes
#else
constexpr int LINEAR_ROWS = REGISTERS > 16 ? 12 : 6;  // of a tile: two sums a row, three for what is multiplied
constexpr int INPUTS = 2;                             // that are multiplied together; weights have a multiple
#endif

// What a tile reads of its rows. Where processors have no products of pairs in bfloat16 that is float32: turned
// once for all columns, it is not turned again beside every block of weights, in registers that sums need.
#if defined(__AVX512BF16__)
typedef BFloat16 Input;
#else
typedef float Input;
#endif

// One block of weights and where its results go: up to COLUMNS columns of rows that are `outputs` wide.
struct Block {
  const BFloat16* weights;
  const float* bias;
  int64_t inputs, outputs;  // inputs are padded
  int columns;
};

// The weights of `inputs` inputs that come `ahead` bytes later: those of the block at hand, or of the next one, for
// which there is room beside the rows in a larger cache only.
inline void prefetch(const BFloat16* weights, int inputs, int64_t ahead) {
  const char* from = reinterpret_cast<const char*>(weights) + ahead;
  const int bytes = inputs * COLUMNS * int(sizeof(BFloat16));
  if (ahead == AHEAD)
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 3);
  else if (ahead)
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
}

inline void store_columns(BFloat16* out, Floats low, Floats high, int columns) {
  BFloat16 row[COLUMNS];
#if defined(__AMX_BF16__)
  // In one instruction; numbers below the least normal one become 0, as those do that tiles multiply.
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  if (columns == COLUMNS) return _mm512_storeu_si512(out, both);
  memcpy(row, &both, sizeof row);
#else
  store(row, low);
  store(row + LANES, high);
#endif
  memcpy(out, row, columns * sizeof(BFloat16));
}

#if defined(__AMX_BF16__)

// What the tile registers hold, as the processor reads it: of 0 to 3 sums (upper rows left and right, lower rows
// left and right), of 4 and 5 upper and lower rows' inputs, of 6 and 7 weights left and right.
struct alignas(64) Tiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};

  explicit Tiles(int count) {
    const uint8_t upper = std::min(count, TILE), lower = count - upper;
    rows[0] = rows[1] = rows[4] = upper;
    rows[2] = rows[3] = rows[5] = lower;
    rows[6] = rows[7] = INPUTS / 2;
    if (!lower) bytes[2] = bytes[3] = bytes[5] = 0;
  }
};

// The compiler does not know what tiles read and write.
inline void settle_memory() { asm volatile("" ::: "memory"); }

template <bool LOWER>
inline void multiply_tiles(const Input* x, const Block& block, int64_t ahead, float (*sums)[LINEAR_ROWS][LANES]) {
  const int64_t row = block.inputs * sizeof(Input), line = 2 * COLUMNS * sizeof(BFloat16);
  const BFloat16* w = block.weights;
  _tile_loadd(0, block.bias, 0);
  _tile_loadd(1, block.bias + LANES, 0);
  if (LOWER) {
    _tile_loadd(2, block.bias, 0);
    _tile_loadd(3, block.bias + LANES, 0);
  }
  for (int64_t i = 0; i < block.inputs; i += INPUTS, w += INPUTS * COLUMNS) {
    prefetch(w, INPUTS, ahead);
    _tile_loadd(6, w, line);
    _tile_loadd(7, w + COLUMNS, line);
    _tile_loadd(4, x + i, row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (LOWER) {
      _tile_loadd(5, x + TILE * block.inputs + i, row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], sizeof(float[LANES]));
  _tile_stored(1, sums[1], sizeof(float[LANES]));
  if (LOWER) {
    _tile_stored(2, sums[0] + TILE, sizeof(float[LANES]));
    _tile_stored(3, sums[1] + TILE, sizeof(float[LANES]));
  }
}

// Rows [rows, inputs] times one block of weights. A sum takes 32 inputs at a time, in order.
void linear_rows(int rows, const Input* x, const Block& block, BFloat16* out, int64_t ahead) {
  const Tiles tiles(rows);
  alignas(64) float sums[2][LINEAR_ROWS][LANES];
  settle_memory();
  _tile_loadconfig(&tiles);
  rows > TILE ? multiply_tiles<true>(x, block, ahead, sums) : multiply_tiles<false>(x, block, ahead, sums);
  _tile_release();
  settle_memory();
  for (int r = 0; r < rows; r++)
    store_columns(out + r * block.outputs, load(sums[0][r]), load(sums[1][r]), block.columns);
}

#else

// To R rows' sums of the block's left and right columns: the products of two inputs, one after the other.
template <int R>
inline void add_products(const Input* x, int64_t inputs, const BFloat16* w, Floats* low, Floats* high) {
#if defined(__AVX512BF16__)
  const __m512bh left = (__m512bh)read<Words>(w), right = (__m512bh)read<Words>(w + COLUMNS);
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    const __m512bh pair = (__m512bh)(Words{} + read<uint32_t>(x + r * inputs));
    low[r] = _mm512_dpbf16_ps(low[r], pair, left);
    high[r] = _mm512_dpbf16_ps(high[r], pair, right);
  }
#else
#pragma GCC unroll 2
  for (int input = 0; input < 2; input++) {
    const Words left = read<Words>(w), right = read<Words>(w + COLUMNS);
    const Floats weights[2] = {(Floats)(input ? left & 0xffff0000u : left << 16),
                               (Floats)(input ? right & 0xffff0000u : right << 16)};
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const Floats given = splat(x[r * inputs + input]);
      low[r] = fma(given, weights[0], low[r]);
      high[r] = fma(given, weights[1], high[r]);
    }
  }
#endif
}

// Rows [R, inputs] times one block of weights.
template <int R>
void linear_tile(const Input* x, const Block& block, BFloat16* out, int64_t ahead) {
  Floats low[R], high[R];
  for (int r = 0; r < R; r++) low[r] = load(block.bias), high[r] = load(block.bias + LANES);
  const BFloat16* w = block.weights;
  for (int64_t i = 0; i < block.inputs; i += INPUTS, w += INPUTS * COLUMNS) {
    prefetch(w, INPUTS, ahead);
    add_products<R>(x + i, block.inputs, w, low, high);
  }
  for (int r = 0; r < R; r++) store_columns(out + r * block.outputs, low[r], high[r], block.columns);
}

template <int R = LINEAR_ROWS>
void linear_rows(int rows, const Input* x, const Block& block, BFloat16* out, int64_t ahead) {
  if (rows == R) return linear_tile<R>(x, block, out, ahead);
  if constexpr (R > 1) linear_rows<R - 1>(rows, x, block, out, ahead);
}

#endif

inline int64_t padded(int64_t inputs) { return ceil_div(inputs, INPUTS) * INPUTS; }

// Rows as tiles read them, padded with zeros. Valid until the thread's next call.
const Input* inputs_of(const BFloat16* x, int64_t rows, int64_t width, int threads) {
  const int64_t wide = padded(width);
  if constexpr (std::is_same_v<Input, BFloat16>)
    if (wide == width) return reinterpret_cast<const Input*>(x);
  thread_local std::vector<Input> scratch;
  if (scratch.size() < size_t(rows * wide)) scratch.resize(rows * wide);
  Input* turned = scratch.data();
  each_row(rows, wide, threads, [&](int64_t r) {
    for (int64_t i = 0; i < wide; i += LANES) {
      const Floats values = i < width ? load_some(x + r * width + i, width - i) : Floats{};
      store_some(turned + r * wide + i, values, wide - i);
    }
  });
  return turned;
}

void linear(const Linear& layer, const BFloat16* rounded, BFloat16* out, int64_t rows, int threads) {
  const int64_t tiles = ceil_div(rows, LINEAR_ROWS), inputs = padded(layer.inputs);
  const Input* x = inputs_of(rounded, rows, layer.inputs, threads);
  each_in_runs(threads, ceil_div(layer.outputs, COLUMNS), [&](int64_t number) {
    const int64_t column = number * COLUMNS;
    const Block block{layer.weights + column * inputs, layer.bias + column, inputs, layer.outputs,
                      int(std::min<int64_t>(COLUMNS, layer.outputs - column))};
    const int64_t next_block = inputs * COLUMNS * int64_t(sizeof(BFloat16));
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
      linear_rows(count, x + row * inputs, block, out + row * layer.outputs + column,
                  t == 0 ? AHEAD : t == 1 ? next_block : 0);
    }
  });
}

// ---- decoder layers ----------------------------------------------------------------------------------------------

// All layers of a forward in one call: no interpreter between them, and what one wrote is still in the cache. The
// same operations in the same roundings as one by one.

// Mirrored in layers.py.
struct DecoderLayer {
  const Layer* attention;
  const BFloat16* input_norm;  // [hidden]; null: none
  const BFloat16* mlp_norm;
  float input_eps, mlp_eps;
  Linear qkv, out, gate_up, down;
};

class Forward {
 public:
  Forward(const Step& step, const DecoderLayer& shapes, int threads)
      : step(step), rows(step.rows), hidden(shapes.qkv.inputs), threads(threads) {
    const int64_t wide = std::max(shapes.qkv.outputs, shapes.gate_up.outputs);
    const int64_t narrow = std::max(shapes.out.inputs, shapes.down.inputs);
    const size_t needed = rows * (2 * hidden + wide + narrow);
    thread_local std::vector<BFloat16> scratch;
    if (scratch.size() < needed) scratch.resize(needed);
    normed = scratch.data();
    added = normed + rows * hidden;
    first = added + rows * hidden;
    second = first + rows * wide;
  }

  // x [rows, hidden], in place.
  void run(const DecoderLayer* layers, int count, BFloat16* x) {
    for (int i = 0; i < count; i++) {
      const DecoderLayer& layer = layers[i];
      const BFloat16* in = add_and_norm(x, i > 0, layer.input_norm, layer.input_eps);
      linear(layer.qkv, in, first, rows, threads);
      attend<BFloat16>(step, *layer.attention, first, second, threads);
      linear(layer.out, second, added, rows, threads);
      linear(layer.gate_up, add_and_norm(x, true, layer.mlp_norm, layer.mlp_eps), first, rows, threads);
      gate(layer.down.inputs);
      linear(layer.down, second, added, rows, threads);
    }
    add_and_norm(x, true, nullptr, 0);
  }

 private:
  const Step& step;
  const int64_t rows, hidden;
  const int threads;
  BFloat16 *normed, *added;  // [rows, hidden]
  BFloat16 *first, *second;  // wide and narrow rows

  const BFloat16* add_and_norm(BFloat16* x, bool adds, const BFloat16* weight, float eps) {
    each_row(rows, hidden, threads, [&](int64_t r) {
      BFloat16* row = x + r * hidden;
      if (adds) add_row(row, added + r * hidden, hidden);
      if (weight) norm_row(row, weight, normed + r * hidden, hidden, eps);
    });
    return weight ? normed : x;
  }

  void gate(int64_t width) {
    each_row(rows, width, threads, [&](int64_t r) {
      const BFloat16* row = first + 2 * r * width;
      swiglu_row(row, row + width, second + r * width, width);
    });
  }
};

// ---- deciding ----------------------------------------------------------------------------------------------------

// Which token a row of logits decides, as `taps.sampling` says it: the first of the best, or where there is noise the
// one whose sum of log-weight and noise is highest. That one is among those with E' <= 2.2 L p, where E' is a lower
// bound of the exponential variate -log2 u by the upper half of the hash, p the weight relative to the best, and L the
// least (E' + 2^-15) / p (`taps.sampling._find_drawn` says why): a handful, compared exactly.

inline Words half_mixed(Words x) {
  x *= 0x7feb352du;
  x ^= x >> 15;
  return x * 0x846ca68bu;
}

struct Lead {
  float value;  // NaN where there is one
  int32_t id;   // the first of equals
};

// The best of x[from, to).
template <typename T>
Lead find_lead(const T* x, int64_t from, int64_t to) {
  Floats most = splat(-INFINITY);
  Words at{}, ids{};
  for (int lane = 0; lane < LANES; lane++) at[lane] = ids[lane] = from + lane;
  for (int64_t i = from; i < to; i += LANES, ids += LANES) {
    Floats values = load_some(x + i, to - i);
    for (int lane = to - i; lane < LANES; lane++) values[lane] = -INFINITY;
    if (any(values != values)) return {NAN, 0};
    const auto better = values > most;
    most = better ? values : most;
    at = better ? ids : at;
  }
  Lead lead{most[0], int32_t(at[0])};
  for (int lane = 1; lane < LANES; lane++)
    if (most[lane] > lead.value || (most[lane] == lead.value && int32_t(at[lane]) < lead.id))
      lead = {most[lane], int32_t(at[lane])};
  return lead;
}

// A token that may win.
struct Contender {
  int32_t id;
  uint32_t hashed;
  float logit, bound, weight;
};

struct Noise {
  float temperature, best;  // 0: there is none; the best logit over the temperature
  uint32_t start, halfway;
  const float* bounds;      // [65536] E'
};

// Appends those of x[from, to) that may win as far as seen; returns the least (E' + 2^-15) / p.
template <typename T>
float find_contenders(const T* x, int64_t from, int64_t to, const Noise& noise, std::vector<Contender>& found) {
  Words ids{};
  for (int lane = 0; lane < LANES; lane++) ids[lane] = from + lane;
  float least = INFINITY;
  for (int64_t i = from; i < to; i += LANES, ids += LANES) {
    const Words hashed = half_mixed(half_mixed((ids ^ (ids >> 16)) ^ noise.start) ^ noise.halfway);
    const Words upper = hashed >> 16;
    const Floats values = load_some(x + i, to - i);
    const Floats logits = noise.temperature == 1 ? values : values / noise.temperature;
    Floats bound, weight = exp_negative(logits - noise.best);
    for (int lane = 0; lane < LANES; lane++) bound[lane] = noise.bounds[upper[lane]];
    for (int lane = to - i; lane < LANES; lane++) weight[lane] = 0;
    const Floats reach = (bound + 0x1p-15f) / weight;
    if (any(reach < least)) least = -horizontal_max(-reach);
    const auto inside = bound <= 2.2f * least * weight;
    if (!any(inside)) continue;
    for (int lane = 0; lane < LANES; lane++)
      if (inside[lane] && weight[lane] > 0)
        found.push_back({int32_t(ids[lane]), hashed[lane], logits[lane], bound[lane], weight[lane]});
  }
  return least;
}

inline double gumbel(uint32_t hashed) {
  const double uniform = (double(hashed ^ (hashed >> 16)) + 0.5) * 0x1p-32;
  return -std::log(-std::log(uniform));
}

// logits [rows, width]; temperatures [rows], 0: no noise; keys [2, rows]. tokens [rows] are written, and best [rows]:
// the best logit over the temperature. Where that is no finite number the token means nothing.
template <typename T>
void decide(const T* logits, int64_t rows, int64_t width, const float* temperatures, const uint32_t* keys,
            const float* bounds, int32_t* tokens, float* best, int threads) {
  const int64_t parts = ceil_div(threads, rows), most = ceil_div(ceil_div(width, parts), LANES) * LANES;
  auto from = [&](int64_t i) { return std::min(width, i % parts * most); };
  auto to = [&](int64_t i) { return std::min(width, (i % parts + 1) * most); };
  std::vector<Lead> leads(rows * parts);
  each(threads, rows * parts, [&](int64_t i) { leads[i] = find_lead(logits + i / parts * width, from(i), to(i)); });
  std::vector<Noise> noises(rows);
  for (int64_t r = 0; r < rows; r++) {
    Lead lead = leads[r * parts];
    for (int64_t i = r * parts + 1; i < (r + 1) * parts; i++)
      if (!(leads[i].value <= lead.value) && lead.value == lead.value) lead = leads[i];
    tokens[r] = lead.id;
    best[r] = temperatures[r] == 0 ? lead.value : lead.value / temperatures[r];
    noises[r] = {temperatures[r], best[r], keys[r], keys[rows + r], bounds};
  }
  auto is_drawn = [&](int64_t r) { return temperatures[r] != 0 && std::isfinite(best[r]); };
  std::vector<std::vector<Contender>> found(rows * parts);
  std::vector<float> least(rows * parts);
  each(threads, rows * parts, [&](int64_t i) {
    const int64_t r = i / parts;
    if (is_drawn(r)) least[i] = find_contenders(logits + r * width, from(i), to(i), noises[r], found[i]);
  });
  each(threads, rows, [&](int64_t r) {
    if (!is_drawn(r)) return;
    const float limit = 2.2f * *std::min_element(&least[r * parts], &least[r * parts] + parts);
    double highest = -INFINITY;
    for (int64_t i = r * parts; i < (r + 1) * parts; i++)
      for (const Contender& one : found[i]) {
        if (!(one.bound <= limit * one.weight)) continue;
        const double score = double(one.logit) + gumbel(one.hashed);
        if (score > highest) highest = score, tokens[r] = one.id;
      }
  });
}

// ---- drafting ----------------------------------------------------------------------------------------------------

// ln x of normal positive numbers, relative to it within 1e-6.
inline Floats log_positive(Floats x) {
  const Truths exponent = ((Truths)x - 0x3f3504f3) >> 23;  // x / 2^e lies between 1 / sqrt(2) and sqrt(2)
  const Floats m = (Floats)((Truths)x - (exponent << 23)), s = (m - 1.0f) / (m + 1.0f), t = s * s;
  Floats series = fma(t, splat(1 / 9.0f), splat(1 / 7.0f));
  series = fma(fma(fma(series, t, splat(1 / 5.0f)), t, splat(1 / 3.0f)), t, splat(1.0f));
  return fma(__builtin_convertvector(exponent, Floats), splat(0.69314718f), 2.0f * s * series);
}

// Gumbel noise of a hash, -ln(-ln u), within 1e-5 where it is above -1: for drafts, which rank by it.
inline Floats draft_noise(Words hashed) {
  // v = 1 - u, from the complement's halves: a sum of exact numbers.
  const Truths upper = (Truths)(~hashed >> 16), lower = (Truths)(~hashed & 0xffff);
  const Floats v = fma(__builtin_convertvector(upper, Floats), splat(0x1p-16f),
                       (__builtin_convertvector(lower, Floats) + 0.5f) * 0x1p-32f);
  const Floats u = 1.0f - v, rounded = 1.0f - u;
  Floats variate = -log_positive(u > 0x1p-24f ? u : splat(0x1p-24f));
  variate = rounded > 0 ? variate * (v / rounded) : v;  // what u lost in rounding: ln u is nearly -v there
  return -log_positive(variate);
}

// to = x + noise of `tokens` under a row's two keys.
template <typename T>
void tilt(const T* x, int64_t width, uint32_t start, uint32_t halfway, const int32_t* tokens, float* to) {
  for (int64_t i = 0; i < width; i += LANES) {
    const int64_t lanes = std::min<int64_t>(LANES, width - i);
    Words id{};
    memcpy(&id, tokens + i, lanes * sizeof(int32_t));
    const Words hashed = half_mixed(half_mixed((id ^ (id >> 16)) ^ start) ^ halfway);
    store_some(to + i, load_some(x + i, lanes) + draft_noise(hashed ^ (hashed >> 16)), lanes);
  }
}

// The k best of a row's logits, their log-probabilities, and the entropy of them all. Of equals the first are the
// best; where there are fewer, log-probabilities of -inf fill up.
template <typename T>
void find_best(const T* x, int64_t width, int k, int32_t* ids, float* logprobs, float* entropy) {
  std::fill(ids, ids + k, 0);
  std::fill(logprobs, logprobs + k, -INFINITY);
  for (int64_t i = 0; i < width; i += LANES) {
    const int lanes = std::min<int64_t>(LANES, width - i);
    const Floats values = load_some(x + i, lanes);
    auto better = values > logprobs[k - 1];
    if (!any(better)) continue;
    for (int lane = 0; lane < lanes; lane++) {
      const float value = values[lane];
      if (!(value > logprobs[k - 1])) continue;
      int at = k - 1;
      for (; at > 0 && value > logprobs[at - 1]; at--) logprobs[at] = logprobs[at - 1], ids[at] = ids[at - 1];
      logprobs[at] = value, ids[at] = i + lane;
    }
  }
  const float best = logprobs[0];
  Floats sum{}, moment{};
  for (int64_t i = 0; i < width; i += LANES) {
    const int lanes = std::min<int64_t>(LANES, width - i);
    Floats below = load_some(x + i, lanes) - best, weight = exp_negative(below);
    for (int lane = lanes; lane < LANES; lane++) weight[lane] = 0;
    sum += weight;
    moment += weight == 0 ? Floats{} : weight * below;
  }
  const float total = horizontal_sum(sum), log_total = std::log(total);
  *entropy = log_total - horizontal_sum(moment) / total;
  for (int i = 0; i < k; i++) logprobs[i] = logprobs[i] - best - log_total;
}

// The same of a row as its noise tilts it. keys: the row's three of `stride` rows, as taps_find_best has them; null:
// there is none.
template <typename T>
void find_best_of(const T* row, int64_t width, int k, const uint32_t* keys, int64_t stride, const int32_t* tokens,
                  int32_t* ids, float* logprobs, float* entropy) {
  if (!keys || !keys[2 * stride]) return find_best(row, width, k, ids, logprobs, entropy);
  thread_local std::vector<float> tilted;
  tilted.resize(width);
  tilt(row, width, keys[0], keys[stride], tokens, tilted.data());
  find_best(tilted.data(), width, k, ids, logprobs, entropy);
}

// ---- growing trees -----------------------------------------------------------------------------------------------

// Whole drafts of many sessions in one call, as `taps.drafting.growth` grows them level by level: between two levels
// an interpreter takes as long as the level does.

// Mirrored in drafting.py.
struct DraftHead {
  const BFloat16* embeddings;  // [tokens, hidden]
  const int32_t* vocabulary;   // [lm_head.outputs] the tokens that logits are of
  const DecoderLayer* layer;
  const float* cos;  // [positions, rotary / 2] of more positions than any path reaches
  const float* sin;
  Linear fc, lm_head;
  int32_t rotary;
};

// Trees that are asked for, and whose: sessions in whose regions there are no rows yet. Mirrored in drafting.py.
struct Asked {
  const int32_t* table;      // [trees, max_blocks]
  const int32_t* committed;  // [trees] positions
  const int32_t* nodes;      // [trees] of a tree at most, ...
  const int32_t* depths;     // ... levels below the root's children, ...
  const int32_t* children;   // ... and of a node
  const uint32_t* keys;      // [1 + most_depth, 3, trees] as find_best has them, of each level; null: no noise
  int32_t trees, max_blocks, most_nodes, most_depth, most_children;
};

struct Node {
  double surprisal;  // cumulative, nats: infinity is no node
  int32_t token, parent;
  float entropy;  // of the distribution of its children, where it has any
};

class Trees {
 public:
  Trees(const DraftHead& head, const Asked& asked, int threads)
      : head(head), asked(asked), threads(threads), hidden(head.fc.outputs),
        nodes(asked.trees), rows(asked.trees), known(asked.trees), drafted(asked.trees) {}

  // roots [trees, hidden]: predicted features; tokens [trees] at the roots.
  Fault grow(const BFloat16* roots, const int32_t* tokens) {
    features.assign(roots, roots + asked.trees * hidden);
    for (int t = 0; t < asked.trees; t++) {
      nodes[t] = {{0, tokens[t], -1, 0}};
      rows[t] = {{0, {}, t}};
    }
    for (int level = 0;; level++) {
      add_children(level);
      if (level == asked.most_depth || !choose_rows(level)) return NONE;
      if (Fault fault = forward()) return fault;
    }
  }

  // The best nodes of each tree, by surprisal, then as they were found: [trees, most_nodes].
  void tell(int32_t* tokens, int32_t* parents, double* surprisals, float* entropies, int32_t* counts) const {
    for (int t = 0; t < asked.trees; t++) {
      const std::vector<Node>& tree = nodes[t];
      const std::vector<int> order = best_of(tree, 0);
      std::vector<int> places(tree.size());
      const int64_t first = int64_t(t) * asked.most_nodes;
      int count = 0;
      for (; count < std::min<int>(order.size(), asked.nodes[t]); count++) {
        const Node& node = tree[order[count]];
        if (node.surprisal == INFINITY) break;
        places[order[count]] = count;
        tokens[first + count] = node.token;
        parents[first + count] = count ? places[node.parent] : -1;
        surprisals[first + count] = node.surprisal;
        entropies[first + count] = node.entropy;
      }
      counts[t] = count;
    }
  }

 private:
  struct Row {
    int number;                 // of the node
    std::vector<int32_t> path;  // the rows of its tree's region that lead to it, itself last
    int feature;                // its row of the features, or its parent's until they are computed
  };

  const DraftHead& head;
  const Asked& asked;
  const int threads;
  const int64_t hidden;
  std::vector<std::vector<Node>> nodes;  // of each tree, level by level
  std::vector<std::vector<Row>> rows;    // that are extended next, best first
  std::vector<int> known;                // nodes of each tree before its newest level
  std::vector<int32_t> drafted;          // rows of each tree's region
  std::vector<BFloat16> features;        // of the rows, or of those before them
  std::vector<BFloat16> logits;

  // Numbers of the nodes from `first` on, best first; of equals the first is the best.
  static std::vector<int> best_of(const std::vector<Node>& tree, int first) {
    std::vector<int> order;
    for (int i = first; i < int(tree.size()); i++) order.push_back(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return tree[a].surprisal < tree[b].surprisal; });
    return order;
  }

  void add_children(int level) {
    const int count = features.size() / hidden, k = std::min<int64_t>(asked.most_children, head.lm_head.outputs);
    const int64_t width = head.lm_head.outputs;
    logits.resize(count * width);
    linear(head.lm_head, features.data(), logits.data(), count, threads);
    std::vector<int> owners;
    for (int t = 0; t < asked.trees; t++) owners.insert(owners.end(), rows[t].size(), t);
    std::vector<int32_t> ids(count * k);
    std::vector<float> logprobs(count * k), entropies(count);
    const uint32_t* keys = asked.keys ? asked.keys + int64_t(level) * 3 * asked.trees : nullptr;
    each(threads, count, [&](int64_t r) {
      const int t = owners[r];
      find_best_of(logits.data() + r * width, width, k, keys ? keys + t : nullptr, asked.trees, head.vocabulary,
                   ids.data() + r * k, logprobs.data() + r * k, entropies.data() + r);
    });
    int r = 0;
    for (int t = 0; t < asked.trees; t++) {
      known[t] = nodes[t].size();
      for (const Row& row : rows[t]) {
        nodes[t][row.number].entropy = entropies[r];
        const double above = nodes[t][row.number].surprisal;
        for (int child = 0; child < k; child++) {
          const double logprob = logprobs[r * k + child];
          const bool is_node = child < asked.children[t] && logprob > -INFINITY;
          nodes[t].push_back({is_node ? above - std::min(logprob, 0.0) : INFINITY,
                              head.vocabulary[ids[r * k + child]], row.number, 0});
        }
        r++;
      }
    }
  }

  // The best nodes of the newest level, but those below which nothing could enter a full tree. False: none.
  bool choose_rows(int level) {
    bool any = false;
    for (int t = 0; t < asked.trees; t++) {
      std::vector<Node>& tree = nodes[t];
      const int64_t most = int64_t(asked.children[t]) * (1 + int64_t(asked.depths[t]) * asked.children[t]);
      const size_t last = std::min<int64_t>(asked.nodes[t], 1 + most) - 1;
      const std::vector<int> all = best_of(tree, 0);
      const double limit = last < all.size() ? tree[all[last]].surprisal : INFINITY;
      std::vector<Row> next;
      for (int number : best_of(tree, known[t])) {
        if (level >= asked.depths[t] || int(next.size()) == asked.children[t]) break;
        if (!(tree[number].surprisal < limit)) break;
        const Row& parent = *std::find_if(rows[t].begin(), rows[t].end(),
                                          [&](const Row& row) { return row.number == tree[number].parent; });
        next.push_back({number, parent.path, parent.feature});
        next.back().path.push_back(drafted[t] + int(next.size()) - 1);
      }
      rows[t] = std::move(next);
      any |= !rows[t].empty();
    }
    return any;
  }

  // The rows through the head: their features from their parents'.
  Fault forward() {
    std::vector<int32_t> starts{0}, ends{0}, offsets, chain(asked.trees, 0);
    std::vector<BFloat16> pairs;
    std::vector<float> cos, sin;
    const int half = head.rotary / 2;
    for (int t = 0; t < asked.trees; t++) {
      for (Row& row : rows[t]) {
        const BFloat16* token = head.embeddings + nodes[t][row.number].token * hidden;
        const BFloat16* feature = features.data() + row.feature * hidden;
        pairs.insert(pairs.end(), token, token + hidden);
        pairs.insert(pairs.end(), feature, feature + hidden);
        offsets.insert(offsets.end(), row.path.begin(), row.path.end());
        const int64_t position = asked.committed[t] + int64_t(row.path.size()) - 1;
        cos.insert(cos.end(), head.cos + position * half, head.cos + (position + 1) * half);
        sin.insert(sin.end(), head.sin + position * half, head.sin + (position + 1) * half);
        row.feature = ends.size() - 1;
        ends.push_back(offsets.size());
      }
      starts.push_back(ends.size() - 1);
    }
    const int count = starts.back();
    const Step step{asked.table, asked.committed, drafted.data(), starts.data(), ends.data(), offsets.data(),
                    chain.data(), cos.data(), sin.data(), asked.trees, asked.max_blocks, count,
                    int32_t(offsets.size()), head.rotary};
    if (Fault fault = find_fault(step, *head.layer->attention)) return fault;
    features.resize(count * hidden);
    linear(head.fc, pairs.data(), features.data(), count, threads);
    Forward(step, *head.layer, threads).run(head.layer, 1, features.data());
    for (int t = 0; t < asked.trees; t++) drafted[t] += rows[t].size();
    return NONE;
  }
};

// ---- the functions that kernel.py calls ----------------------------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <typename Work>
void with_dtype(int32_t dtype, const Work& work) {
  if (dtype == 0) return work(float{});
  if (dtype == 1) return work(BFloat16{});
  work(Float16{});
}

}  // namespace

EXPORT void taps_rms_norm(void* x, const void* residual, const void* weight, void* out, int64_t rows,
                          int64_t width, float eps, int32_t dtype, int32_t threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    each_row(rows, width, threads, [&](int64_t r) {
      T* row = static_cast<T*>(x) + r * width;
      if (residual) add_row(row, static_cast<const T*>(residual) + r * width, width);
      norm_row(row, static_cast<const T*>(weight), static_cast<T*>(out) + r * width, width, eps);
    });
  });
}

EXPORT void taps_swiglu(const void* gate_up, void* out, int64_t rows, int64_t width, int32_t dtype,
                        int32_t threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    each_row(rows, width, threads, [&](int64_t r) {
      const T* gate = static_cast<const T*>(gate_up) + 2 * r * width;
      swiglu_row(gate, gate + width, static_cast<T*>(out) + r * width, width);
    });
  });
}

// Columns of a block of packed weights.
EXPORT int64_t taps_linear_columns() { return COLUMNS; }

// Their inputs are filled up to a multiple of it.
EXPORT int64_t taps_linear_inputs() { return INPUTS; }

EXPORT void taps_linear(const Linear* layer, const void* x, void* out, int64_t rows, int32_t threads) {
  linear(*layer, static_cast<const BFloat16*>(x), static_cast<BFloat16*>(out), rows, threads);
}

// x [rows, hidden] in place. Returns a Fault; nothing is touched if there is one.
EXPORT int32_t taps_layers(const Step* step, const DecoderLayer* layers, int32_t count, void* x, int32_t threads) {
  for (int i = 0; i < count; i++)
    if (Fault fault = find_fault(*step, *layers[i].attention)) return fault;
  Forward(*step, *layers, threads).run(layers, count, static_cast<BFloat16*>(x));
  return NONE;
}

// As `decide`.
EXPORT void taps_decide(const void* logits, int64_t rows, int64_t width, const float* temperatures,
                        const uint32_t* keys, const float* bounds, int32_t* tokens, float* best, int32_t dtype,
                        int32_t threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    decide(static_cast<const T*>(logits), rows, width, temperatures, keys, bounds, tokens, best, threads);
  });
}

// logits [rows, width]; ids and logprobs [rows, k] and entropies [rows] are written. keys [3, rows]: the two of a
// row's noise, and whether it has any; null: none has. tokens [width]: whose noise.
EXPORT void taps_find_best(const void* logits, const uint32_t* keys, const int32_t* tokens, int64_t rows,
                           int64_t width, int32_t k, int32_t* ids, float* logprobs, float* entropies, int32_t dtype,
                           int32_t threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    each(threads, rows, [&](int64_t r) {
      find_best_of(static_cast<const T*>(logits) + r * width, width, k, keys ? keys + r : nullptr, rows, tokens,
                   ids + r * k, logprobs + r * k, entropies + r);
    });
  });
}

// Drafts of predicted features [trees, hidden] and tokens [trees] at the roots. tokens, parents, surprisals and
// entropies [trees, most_nodes] and counts [trees] are written. Returns a Fault.
EXPORT int32_t taps_grow(const DraftHead* head, const Asked* asked, const void* roots, const int32_t* root_tokens,
                         int32_t* tokens, int32_t* parents, double* surprisals, float* entropies, int32_t* counts,
                         int32_t threads) {
  Trees trees(*head, *asked, threads);
  if (Fault fault = trees.grow(static_cast<const BFloat16*>(roots), root_tokens)) return fault;
  trees.tell(tokens, parents, surprisals, entropies, counts);
  return NONE;
}

// Returns a Fault; nothing is touched if there is one.
EXPORT int32_t taps_attend(const Step* step, const Layer* layer, const void* qkv, void* out, int32_t threads) {
  Fault fault = find_fault(*step, *layer);
  if (fault != NONE) return fault;
  with_dtype(layer->dtype, [&](auto zero) {
    using T = decltype(zero);
    attend(*step, *layer, static_cast<const T*>(qkv), static_cast<T*>(out), threads);
  });
  return NONE;
}
