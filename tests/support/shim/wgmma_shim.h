// What wgmma.cuh gives kernels, on the host, by the PTX ISA: mbarriers with phases and bytes, boxes that TMA copies, with
// zeros outside and swizzled cells, and products of 128 threads that read shared memory through descriptors. A copy is done
// at a random later time, some very late; what it is to fill is NaN until then. A product is done where it is committed or where it is
// waited for, by chance, and its accumulators are NaN in between. So a wait that is missing, or a buffer given back too
// early, shows in the result; what would hang or is forbidden ends with a number of the table in host_shim.py.
#include "mma_shim.h"
#define __grid_constant__
struct TensorMap;

namespace shim {
enum { NO_BARRIER = 3, ARRIVALS, PLACE, DISAGREE, NO_BEGIN, NO_FENCE, UNFINISHED, REGISTERS, TOUCHED };
struct Barrier {
  int count = 0, pending = 0;
  long long bytes = 0;
  Gate gate;  // opens with every phase
  void check() {
    if (pending == 0 && bytes == 0) pending = count, gate.opened++;
  }
};
struct Map { long long data, size[4], stride[3], rows; };  // columns, heads, rows, sequences; bytes
struct Copy {
  enum { BOX, BYTES, STORE } kind;
  Map map;
  int at[4];
  unsigned shared, bytes, barrier;
  const void* from;
  size_t thread;
  unsigned delay;
};
struct Product {
  int n, turn_a, turn_b, add;
  bool in_registers;
  unsigned long long a, b;
  float* d[128];
  unsigned left[128][4];
};
struct Held {  // accumulators at work
  int n;
  float* d[128];
  std::vector<float> sums;
};
struct Batch { std::vector<Product> products; bool done; };
struct Group {
  Gate gate;
  int arrived = 0, registers = 0;
  Product next;
  std::vector<Product> open;
  std::deque<Batch> batches;
  std::map<float*, Held> held;  // by the place of those of the first thread
};
inline std::map<unsigned, Barrier> barriers;
inline std::vector<Copy> copies;
inline Group groups[MOST / 128];
inline Gate named[16];
inline bool begun[MOST], storing[MOST];
constexpr size_t SHARED = sizeof dynamic_shared;
inline unsigned char unfenced[SHARED];  // written by plain code, not yet for TMA and wgmma
inline std::vector<unsigned> written[MOST];

[[noreturn]] inline void fail(int code) {
  if (!fault) fault = code;
  for (;;) {
    static Gate never;
    never.members = 1 << 30;
    wait(never);
  }
}
inline Barrier& barrier(unsigned at) {
  if (!barriers.count(at)) fail(NO_BARRIER);
  return barriers[at];
}
inline unsigned swizzled(unsigned at) { return at ^ (at >> 7 & 7) << 4; }
inline void readable(unsigned at, unsigned bytes) {
  if (at + bytes > SHARED) fault = PLACE;
  else
    for (unsigned i = 0; i < bytes; i++)
      if (unfenced[at + i]) fault = NO_FENCE;
}
inline void perform(const Copy& c) {
  if (c.kind == Copy::BYTES) {
    std::memcpy(shared_base() + c.shared, c.from, c.bytes);
  } else {
    const Map& m = c.map;
    for (int r = 0; r < m.rows; r++)
      for (int i = 0; i < 64; i++) {
        const long long x = c.at[0] + i, y = c.at[2] + r;
        const bool inside = x >= 0 && x < m.size[0] && c.at[1] >= 0 && c.at[1] < m.size[1] && y >= 0 && y < m.size[2] &&
                            c.at[3] >= 0 && c.at[3] < m.size[3];
        const unsigned at = swizzled(c.shared + r * 128 + i * 2);
        auto* const there = reinterpret_cast<unsigned char*>(m.data) + 2 * x + c.at[1] * m.stride[0] + y * m.stride[1] +
                            c.at[3] * m.stride[2];
        if (c.kind == Copy::STORE) {
          readable(at, 2);
          if (inside) std::memcpy(there, shared_base() + at, 2);
        } else if (inside) std::memcpy(shared_base() + at, there, 2);
        else std::memset(shared_base() + at, 0, 2);
      }
  }
  if (c.kind == Copy::STORE) return;
  Barrier& b = barriers[c.barrier];
  b.bytes -= c.bytes, b.check();
}
inline bool perform_some(bool all) {  // of the copies; tells whether there were any
  if (copies.empty()) return false;
  shuffle(copies);
  std::vector<Copy> some;
  for (size_t i = copies.size(); i-- > 0;)
    if (all || random(copies[i].delay) == 0) some.push_back(copies[i]), copies.erase(copies.begin() + i);
  for (const Copy& c : some) perform(c);
  return true;
}
inline void fill(unsigned to, unsigned bytes) {
  if (to + bytes > SHARED) fail(PLACE);
  std::memset(shared_base() + to, 0xff, bytes);
  std::memset(unfenced + to, 0, bytes);
}
inline void start(Copy c) {
  if (c.shared % (c.kind == Copy::BYTES ? 16 : 1024)) fail(PLACE);
  c.thread = now, c.delay = random(3) ? 3 : 60;  // some come late
  copies.push_back(c);
}

// Element i of M or N, k of an operand.
inline float element(unsigned long long d, bool turned, int i, int k) {
  const unsigned begin = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4;
  const unsigned at = swizzled(turned ? begin + i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2
                                      : begin + i / 8 * stride + i % 8 * 128 + k * 2);
  readable(at, 2);
  unsigned short x = 0;
  if (!fault) std::memcpy(&x, shared_base() + at, 2);
  return __uint_as_float((unsigned)x << 16);
}
inline void perform(Group& g, const Product& p) {
  static float a[64][16], b[256][16];
  for (int k = 0; k < 16; k++) {
    for (int i = 0; i < 64; i++) {
      const int thread = i / 16 * 32 + i % 8 * 4 + k % 8 / 2, word = i / 8 % 2 + k / 8 * 2;
      a[i][k] = p.in_registers ? half_of(p.left[thread][word], k % 2) : element(p.a, p.turn_a, i, k);
    }
    for (int j = 0; j < p.n; j++) b[j][k] = element(p.b, p.turn_b, j, k);
  }
  float* const sums = g.held[p.d[0]].sums.data();
  for (int t = 0; t < 128; t++)
    for (int x = 0; x < p.n / 2; x++) {
      const int row = t / 32 * 16 + t % 32 / 4 + x / 2 % 2 * 8, column = x / 4 * 8 + t % 4 * 2 + x % 2;
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += a[row][k] * b[column][k];
      float& d = sums[t * (p.n / 2) + x];
      d = p.add ? d + sum : sum;
    }
}
inline void perform_all_but(Group& g, size_t last) {
  for (size_t i = 0; i + last < g.batches.size(); i++)
    if (!g.batches[i].done) {
      g.batches[i].done = true;
      for (const Product& p : g.batches[i].products) perform(g, p);
    }
}
inline void start(Group& g) {
  const Product& p = g.next;
  if (!g.held.count(p.d[0])) {
    Held& h = g.held[p.d[0]];
    h.n = p.n / 2;
    for (int t = 0; t < 128; t++)
      for (int x = 0; x < h.n; x++) h.d[t] = p.d[t], h.sums.push_back(p.d[t][x]), p.d[t][x] = NAN;
  }
  g.open.push_back(p);
}
inline void give_back(Group& g) {  // the accumulators that nothing works on any more
  std::map<float*, bool> busy;
  for (const Product& p : g.open) busy[p.d[0]] = true;
  for (const Batch& b : g.batches)
    for (const Product& p : b.products) busy[p.d[0]] = true;
  for (auto it = g.held.begin(); it != g.held.end();) {
    Held& h = it->second;
    if (busy.count(it->first)) ++it;
    else {
      for (int t = 0; t < 128; t++)
        for (int x = 0; x < h.n; x++) {
          if (h.d[t][x] == h.d[t][x]) fault = TOUCHED;
          h.d[t][x] = h.sums[t * h.n + x];
        }
      it = g.held.erase(it);
    }
  }
}
// The last of a group to come does what is to be done; all go on together.
template <class F> void together(F f) {
  Group& g = groups[now / 128];
  if (++g.arrived == 128) g.arrived = 0, f(g);
  wait(g.gate);
}
inline void product(Product p, float* d, const unsigned* left) {
  Group& g = groups[now / 128];
  const size_t t = now % 128;
  if (!begun[now]) fail(NO_BEGIN);
  p.in_registers = left;
  if (g.arrived == 0) g.next = p;
  const Product& q = g.next;
  if (p.n != q.n || p.turn_a != q.turn_a || p.turn_b != q.turn_b || p.add != q.add || p.a != q.a || p.b != q.b ||
      p.in_registers != q.in_registers)
    fail(DISAGREE);
  g.next.d[t] = d;
  if (left) std::memcpy(g.next.left[t], left, 16);
  together([](Group& g) { start(g); });
}
inline void begin_block() {
  barriers.clear(), copies.clear();
  for (Group& g : groups) g = Group{}, g.gate.members = 128;
  for (Gate& g : named) g = Gate{};
  std::memset(begun, 0, sizeof begun), std::memset(storing, 0, sizeof storing);
  std::memset(unfenced, 0, sizeof unfenced);
  for (auto& w : written) w.clear();
}
inline void end_block() {
  const int threads = blockDim.x, entry = 65536 / threads / 8 * 8;
  int asked = 0;
  for (int g = 0; g < threads / 128; g++) {
    asked += 128 * (groups[g].registers ? groups[g].registers : entry);
    if (!groups[g].open.empty() || !groups[g].batches.empty()) fault = UNFINISHED;
  }
  for (bool s : storing)
    if (s || !copies.empty()) fault = UNFINISHED;
  if (asked > entry * threads) fault = REGISTERS;
}
inline const bool installed = (deferred = perform_some, before_block = begin_block, after_block = end_block, true);
}  // namespace shim

inline unsigned shared_begin() { return 0; }
inline unsigned shared_get(unsigned at) { return *reinterpret_cast<unsigned*>(shim::shared_base() + at); }
inline uint4 shared_get4(unsigned at) { return *reinterpret_cast<uint4*>(shim::shared_base() + at); }
inline void shared_put(unsigned at, unsigned x) {
  std::memcpy(shim::shared_base() + at, &x, 4);
  std::memset(shim::unfenced + at, 1, 4);
  shim::written[shim::now].push_back(at);
}
inline void fence_async() {
  for (unsigned at : shim::written[shim::now]) std::memset(shim::unfenced + at, 0, 4);
  shim::written[shim::now].clear();
}

inline void barrier_make(unsigned at, unsigned count) {
  if (at % 8) shim::fail(shim::PLACE);
  shim::barriers[at] = {(int)count, (int)count};
}
inline void barriers_made() {}
inline void barrier_arrive(unsigned at) {
  shim::Barrier& b = shim::barrier(at);
  if (b.pending-- == 0) shim::fail(shim::ARRIVALS);
  b.check();
}
inline void barrier_expect(unsigned at, unsigned bytes) {
  shim::barrier(at).bytes += bytes;
  barrier_arrive(at);
}
inline void barrier_wait(unsigned at, unsigned parity) {
  for (;;) {
    shim::Barrier& b = shim::barrier(at);
    if (b.gate.opened % 2 != parity) return;
    shim::watch(b.gate);
  }
}

inline shim::Copy box(unsigned shared, const TensorMap* map, int column, int head, int row, int batch) {
  shim::Copy c = {};
  std::memcpy(&c.map, map, sizeof c.map);
  c.at[0] = column, c.at[1] = head, c.at[2] = row, c.at[3] = batch;
  c.shared = shared, c.bytes = 128 * c.map.rows;
  return c;
}
inline void tile_load(unsigned to, const TensorMap* map, int column, int head, int row, int batch, unsigned barrier) {
  shim::Copy c = box(to, map, column, head, row, batch);
  c.kind = shim::Copy::BOX, c.barrier = barrier;
  shim::barrier(barrier);
  shim::fill(to, c.bytes);
  shim::start(c);
}
inline void bytes_load(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  shim::Copy c = {};
  c.kind = shim::Copy::BYTES, c.shared = to, c.from = from, c.bytes = bytes, c.barrier = barrier;
  shim::barrier(barrier);
  shim::fill(to, bytes);
  shim::start(c);
}
inline void tile_store(const TensorMap* map, int column, int head, int row, int batch, unsigned from) {
  shim::Copy c = box(from, map, column, head, row, batch);
  c.kind = shim::Copy::STORE, shim::storing[shim::now] = true;
  shim::start(c);
}
inline void stores_commit() {}
inline void stores_wait() {
  shim::storing[shim::now] = false;
  for (size_t i = shim::copies.size(); i-- > 0;) {
    const shim::Copy c = shim::copies[i];
    if (c.kind != shim::Copy::STORE || c.thread != shim::now) continue;
    shim::copies.erase(shim::copies.begin() + i);
    shim::perform(c);
  }
}

inline void group_sync(int id) { shim::named[id].members = 128, shim::wait(shim::named[id]); }
inline void turn_wait(int id) { shim::named[id].members = 256, shim::wait(shim::named[id]); }
inline void turn_pass(int id) {
  shim::Gate& g = shim::named[id];
  g.members = 256, g.arrived++, g.check();
}
template <int N> void registers_less() { shim::groups[shim::now / 128].registers = N; }
template <int N> void registers_more() { shim::groups[shim::now / 128].registers = N; }

template <class... D> void products_begin(D&...) { shim::begun[shim::now] = true; }
inline void products_commit() {
  shim::together([](shim::Group& g) {
    g.batches.push_back({std::move(g.open), false});
    g.open.clear();
    if (shim::random(2)) shim::perform_all_but(g, 0);
  });
}
template <int N, class... D> void products_wait(D&...) {
  shim::begun[shim::now] = false;
  shim::together([](shim::Group& g) {
    shim::perform_all_but(g, N);
    while (g.batches.size() > N) g.batches.pop_front();
    shim::give_back(g);
  });
}
template <int TURN_A, int TURN_B, int N>
void product(float (&d)[N], unsigned long long a, unsigned long long b, int add) {
  shim::product({2 * N, TURN_A, TURN_B, add, false, a, b}, d, nullptr);
}
template <int TURN_B, int N>
void product(float (&d)[N], const unsigned (&a)[4], unsigned long long b, int add) {
  shim::product({2 * N, 0, TURN_B, add, true, 0, b}, d, a);
}
