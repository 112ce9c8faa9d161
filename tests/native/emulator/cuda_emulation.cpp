// The engine of cuda_emulation.h. It is compiled without sanitizers even if the device code has them, so that its own
// bookkeeping is no data race; if the runtime of a sanitizer is linked in, it is told about the fibers here.
#include "cuda_emulation.h"

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "stacks.h"
#include "settings.h"

namespace gcnet_ext::cuda::emulation {

const Indices* indices = nullptr;
dim3 block_size, grid_size;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kSharedBytes = 48 << 10;  // more needs allow_shared_bytes()
constexpr unsigned kMostCopies = 128;      // of a thread, under way
constexpr unsigned kMostYields = 20000;    // while nobody gets on

struct Block;

enum class Wait : uint8_t { none, block_barrier, cluster_barrier, warp_meeting, exited };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  Indices indices;
  Fiber fiber;
  Block* block;
  unsigned lane, warp;
  Wait wait = Wait::none;
  Site site;  // where it waits
  bool waited_for_previous = false;
  // The arguments of a meeting of its warp; `value` is also the result.
  Meeting what;
  unsigned mask, source;
  uint64_t value;
  Copy* copies;  // a ring of kMostCopies
  unsigned first_copy = 0, end_of_copies = 0;
};

struct Warp {
  unsigned waiting = 0;  // lanes that wait for others
  // Neighbouring meetings order memory through different addresses: a lane that is already at the next one must not pass what
  // it did in between to a lane that has yet to leave this one.
  unsigned meetings = 0;
  char order[64];
};

// The threads that meet at a barrier.
struct Barrier {
  unsigned waiting = 0, passed = 0;
  Site site;
  char order[2];  // of even and odd barriers, so that a thread that is already at the next one orders nothing for this one
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t stack_set = 0;  // the stacks that its threads run on
  unsigned running = 0;
  Barrier barrier, cluster_barrier;  // the latter is that of the first block of the cluster
};

// A text without allocations, because a thread that fails is never resumed to free them.
struct Message {
  char text[1024] = "";
  size_t length = 0;

  __attribute__((format(printf, 2, 3))) void add(const char* format, ...) {
    va_list values;
    va_start(values, format);
    const int written = vsnprintf(text + length, sizeof(text) - length, format, values);
    va_end(values);
    length = std::min(sizeof(text) - 1, length + std::max(written, 0));
  }
  void add_place(const Indices& at) {
    add("block %u,%u,%u thread %u,%u,%u", at.block.x, at.block.y, at.block.z, at.thread.x, at.thread.y, at.thread.z);
  }
};

class Launch {
 public:
  Launch(size_t shared_bytes, const Options& options, void (*body)(const void*), const void* closure)
      : shared_bytes_(shared_bytes), options_(options), body_(body), closure_(closure) {}
  ~Launch();

  void run();
  void block_barrier(Site site);
  void cluster_barrier(Site site);
  void yield(Site site);
  unsigned cluster_rank() const { return id_of(*current->block) % options_.cluster; }
  void* shared_of_rank(void* own, unsigned rank);
  uint64_t meet(Meeting what, unsigned mask, uint64_t value, unsigned source, Site site);
  template <class... Values>
  [[noreturn]] void fail(const char* format, Values... values);

  int acq_rel(const Site& site) const;
  bool dropped(const Site& site) const { return dropped_.half.empty() && dropped_.is(site); }
  void copy_later(const Copy& copy);
  void waited(const Site& site) { current->waited_for_previous |= !dropped(site); }
  void require_waited(const char* before);

  Thread* current = nullptr;

 private:
  static void thread_main();
  size_t id_of(const Block& block) const { return &block - blocks_.data(); }
  std::span<Block> cluster_of(const Block& block) {
    return {&blocks_[id_of(block) / options_.cluster * options_.cluster], options_.cluster};
  }
  void meet_at(Barrier& barrier, std::span<Block> blocks, Wait wait, Site site);
  void start(unsigned block_id);
  void finish(Block& block);
  void ready(Thread& thread);
  void leave(Wait wait, Site site);
  Thread& next();
  void complete(Warp& warp, Thread* lanes, unsigned mask);
  void describe_deadlock();

  const size_t shared_bytes_;
  const Options options_;
  void (*const body_)(const void*);
  const void* const closure_;
  Schedule schedule_;
  const Dropped dropped_;
  std::vector<Thread*> queue_;  // a ring of the threads that are ready
  size_t queue_begin_ = 0, queue_end_ = 0, queue_mask_ = 0;
  std::vector<Block> blocks_;
  Message failure_;
  Fiber host_;
  Block* finished_ = nullptr;
  std::deque<size_t> free_stack_sets_;
  unsigned yields_ = 0;             // since somebody has got on
  std::unique_ptr<Copy[]> copies_;  // of all threads that run at a time
  char begin_ = 0, end_ = 0;        // addresses that order the start of the launch before its threads, and these before its end
};

Launch* launch = nullptr;
StackSets stack_sets;

// Takes the thread whose turn it is off the queue.
Thread& Launch::next() {
  const auto at = [&](size_t i) -> Thread*& { return queue_[i & queue_mask_]; };
  const size_t chosen = schedule_.depth_first ? queue_end_ - 1 : queue_begin_;
  if (schedule_.seed) std::swap(at(queue_begin_ + schedule_.random(queue_end_ - queue_begin_)), at(chosen));
  current = at(chosen);
  schedule_.depth_first ? queue_end_-- : queue_begin_++;
  indices = &current->indices;
  return *current;
}

void Launch::ready(Thread& thread) {
  thread.wait = Wait::none;
  queue_[queue_end_++ & queue_mask_] = &thread;
}

// Lets the next thread run, or the host if it has something to do, until this thread is ready again.
void Launch::leave(Wait wait, Site site) {
  Thread& self = *current;
  self.wait = wait;
  self.site = site;
  yields_ = 0;
  const bool host = finished_ || queue_begin_ == queue_end_;
  switch_fiber(self.fiber, host ? host_ : next().fiber, wait == Wait::exited);
}

template <class... Values>
void Launch::fail(const char* format, Values... values) {
  failure_.add_place(current->indices);
  failure_.add(": ");
  failure_.add(format, values...);
  sanitizer_release(&end_);
  switch_fiber(current->fiber, host_, false);
  std::abort();  // nobody resumes a failed thread
}

void Launch::thread_main() {
  fiber_started();
  sanitizer_acquire(&launch->begin_);
  launch->body_(launch->closure_);
  launch->require_waited("its end");
  sanitizer_release(&launch->end_);
  Block& block = *launch->current->block;
  if (--block.running == 0) launch->finished_ = &block;
  launch->leave(Wait::exited, Site::current());
}

// Lets this thread go on when all threads of the blocks are here.
void Launch::meet_at(Barrier& barrier, std::span<Block> blocks, Wait wait, Site site) {
  if (dropped(site)) return;
  if (barrier.waiting && barrier.site.line() != site.line())
    fail("a barrier in line %u while others wait at the one in line %u", site.line(), barrier.site.line());
  char* order = &barrier.order[barrier.passed % 2];
  sanitizer_release(order);
  barrier.site = site;
  yields_ = 0;
  if (++barrier.waiting < blocks.size() * block_size.x * block_size.y * block_size.z) {
    leave(wait, site);
  } else {
    barrier.waiting = 0;
    barrier.passed++;
    for (Block& block : blocks) {
      for (Thread& thread : block.threads) {
        if (thread.wait == wait) ready(thread);
      }
    }
  }
  sanitizer_acquire(order);
}

void Launch::block_barrier(Site site) {
  Block& block = *current->block;
  meet_at(block.barrier, {&block, 1}, Wait::block_barrier, site);
}

void Launch::cluster_barrier(Site site) {
  const std::span<Block> cluster = cluster_of(*current->block);
  meet_at(cluster[0].cluster_barrier, cluster, Wait::cluster_barrier, site);
}

void* Launch::shared_of_rank(void* own, unsigned rank) {
  if (rank >= options_.cluster) fail("shared memory of rank %u in a cluster of %u", rank, options_.cluster);
  const Block& other = cluster_of(*current->block)[rank];
  if (other.running == 0) fail("shared memory of rank %u, which has ended", rank);
  return other.shared + (static_cast<unsigned char*>(own) - current->block->shared);
}

// All other threads that are ready run before this one does again, unless the order is random.
void Launch::yield(Site site) {
  if (++yields_ > kMostYields) fail("nobody gets on while this thread waits in line %u", site.line());
  Thread& self = *current;
  if (schedule_.depth_first) {
    queue_[--queue_begin_ & queue_mask_] = &self;
  } else {
    ready(self);
  }
  if (finished_) return switch_fiber(self.fiber, host_, false);
  Thread& other = next();
  if (&other != &self) switch_fiber(self.fiber, other.fiber, false);
}

void Launch::copy_later(const Copy& copy) {
  if (current->end_of_copies - current->first_copy == kMostCopies)
    fail("more than %u copies that nobody waits for", kMostCopies);
  std::memset(copy.to, 0xff, copy.bytes);  // NaN in every dtype
  current->copies[current->end_of_copies++ % kMostCopies] = copy;
}

void Launch::require_waited(const char* before) {
  if (options_.early && !current->waited_for_previous) fail("no wait for the previous launch before %s", before);
}

int Launch::acq_rel(const Site& site) const {
  if (!dropped_.is(site)) return __ATOMIC_ACQ_REL;
  return dropped_.half == "acquire" ? __ATOMIC_RELEASE : __ATOMIC_ACQUIRE;
}

uint64_t Launch::meet(Meeting what, unsigned mask, uint64_t value, unsigned source, Site site) {
  if (what == Meeting::barrier && dropped(site)) return 0;
  Thread& self = *current;
  Warp& warp = self.block->warps[self.warp];
  Thread* lanes = &self - self.lane;
  if (!(mask >> self.lane & 1)) fail("lane %u is not in the mask of its own warp operation", self.lane);
  if (what == Meeting::shuffle && !(mask >> source & 1)) fail("shuffle from lane %u, which is not in the mask", source);
  if (const unsigned others = warp.waiting & mask) {
    const Thread& other = lanes[__builtin_ctz(others)];
    if (other.mask != mask || other.what != what || other.site.line() != site.line()) {
      fail("warp operation in line %u while other lanes are at another one or name another mask, in line %u", site.line(),
           other.site.line());
    }
  }
  self.what = what;
  self.mask = mask;
  self.value = value;
  self.source = source;
  char* order = &warp.order[warp.meetings % sizeof(warp.order)];
  if (what == Meeting::barrier) sanitizer_release(order);
  warp.waiting |= 1u << self.lane;
  if ((warp.waiting & mask) == mask) {
    complete(warp, lanes, mask);
  } else {
    leave(Wait::warp_meeting, site);
  }
  if (what == Meeting::barrier) sanitizer_acquire(order);
  return self.value;
}

// Called when all lanes of the mask have met. Every one gets its result, and those that waited can go on.
void Launch::complete(Warp& warp, Thread* lanes, unsigned mask) {
  uint64_t values[kWarp], votes = 0;
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const unsigned lane = __builtin_ctz(rest);
    values[lane] = lanes[lane].value;
    votes |= (values[lane] & 1) << lane;
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Thread& thread = lanes[__builtin_ctz(rest)];
    thread.value = thread.what == Meeting::ballot ? votes : values[thread.source];
    if (&thread != current) ready(thread);
  }
  warp.waiting &= ~mask;
  warp.meetings++;
  yields_ = 0;
}

void Launch::start(unsigned id) {
  Block& block = blocks_[id];
  const unsigned count = block_size.x * block_size.y * block_size.z;
  block.stack_set = free_stack_sets_.front();
  free_stack_sets_.pop_front();
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, std::max<size_t>(shared_bytes_, 1))) throw std::bad_alloc();
  block.shared = static_cast<unsigned char*>(shared);
  std::memset(block.shared, 0xff, shared_bytes_);  // NaN in every dtype
  block.running = count;
  block.warps.resize((count + kWarp - 1) / kWarp);
  block.threads.resize(count);
  for (unsigned i = 0; i < count; i++) {
    Thread& thread = block.threads[i];
    thread.indices.thread = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    thread.indices.block = dim3(id % grid_size.x, id / grid_size.x % grid_size.y, id / grid_size.x / grid_size.y);
    thread.block = &block;
    thread.lane = i % kWarp;
    thread.warp = i / kWarp;
    thread.copies = &copies_[(block.stack_set * count + i) * kMostCopies];
    stack_sets.create(thread.fiber, block.stack_set, i, thread_main);
  }
  sanitizer_release(&begin_);
  for (unsigned i = 0; i < count; i++) ready(block.threads[schedule_.depth_first ? count - 1 - i : i]);
}

void Launch::finish(Block& block) {
  block.threads.clear();
  // A store that a sanitizer does not see: it knows of nothing that orders it behind the threads of the block.
  for (volatile unsigned char* byte = block.shared; byte != block.shared + shared_bytes_; byte++) *byte = 0xff;
  if (__asan_poison_memory_region) __asan_poison_memory_region(block.shared, shared_bytes_);
  free_stack_sets_.push_back(block.stack_set);
}

void Launch::run() {
  const unsigned count = grid_size.x * grid_size.y * grid_size.z;
  blocks_.resize(count);
  std::vector<unsigned> order(count / options_.cluster);  // of the clusters
  std::iota(order.begin(), order.end(), 0);
  if (schedule_.seed) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[schedule_.random(i)]);
  }
  const size_t most_at_a_time = kClustersAtATime * options_.cluster;
  for (size_t i = 0; i < most_at_a_time; i++) free_stack_sets_.push_back(i);
  copies_ = std::make_unique_for_overwrite<Copy[]>(most_at_a_time * block_size.x * block_size.y * block_size.z * kMostCopies);
  adopt_host(host_);
  const size_t at_a_time = schedule_.depth_first ? options_.cluster : most_at_a_time;
  queue_.resize(std::bit_ceil<size_t>(at_a_time * block_size.x * block_size.y * block_size.z));
  queue_mask_ = queue_.size() - 1;
  size_t started = 0, running = 0;
  while (running || started < count) {
    for (; running + options_.cluster <= at_a_time && started < count;
         started += options_.cluster, running += options_.cluster) {
      for (unsigned rank = 0; rank < options_.cluster; rank++)
        start(order[started / options_.cluster] * options_.cluster + rank);
    }
    if (queue_begin_ == queue_end_) {
      describe_deadlock();
    } else {
      switch_fiber(host_, next().fiber, false);
    }
    if (finished_) {
      finish(*finished_);
      finished_ = nullptr;
      running--;
    }
    if (failure_.length) {
      stack_sets.reset(host_, &end_);
      sanitizer_acquire(&end_);
      throw std::runtime_error(failure_.text);
    }
  }
  sanitizer_acquire(&end_);
}

void Launch::describe_deadlock() {
  failure_.add("deadlock, or a barrier that not all threads reach:");
  for (const Block& block : blocks_) {
    for (const Thread& thread : block.threads) {
      if (thread.lane != 0 && thread.wait == (&thread)[-1].wait && thread.site.line() == (&thread)[-1].site.line()) continue;
      failure_.add("\n  from ");
      failure_.add_place(thread.indices);
      if (thread.wait == Wait::exited) failure_.add(" on: exited");
      if (thread.wait == Wait::block_barrier) failure_.add(" on: waits at the __syncthreads in line %u", thread.site.line());
      if (thread.wait == Wait::cluster_barrier) failure_.add(" on: waits for its cluster in line %u", thread.site.line());
      if (thread.wait == Wait::warp_meeting) failure_.add(" on: waits for its warp in line %u", thread.site.line());
    }
  }
}

Launch::~Launch() {
  for (Block& block : blocks_) {
    if (__asan_unpoison_memory_region && block.shared) __asan_unpoison_memory_region(block.shared, shared_bytes_);
    std::free(block.shared);
  }
  indices = nullptr;
}

// The accesses of a byte while they were counted.
struct Counts {
  unsigned loads = 0, stores = 0;
};
size_t allowed_bytes = 0;  // to the next launch
int64_t all_launches = 0;
bool counting = false;
std::unordered_map<uintptr_t, Counts> counts;

void note(const void* address, size_t bytes, unsigned Counts::* counter) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  if (first % bytes) launch->fail("access of %zu bytes is not aligned", bytes);
  if (!counting) return;
  for (size_t i = 0; i < bytes; i++) counts[first + i].*counter += 1;
}

}  // namespace

int64_t launches() { return all_launches; }

void run(dim3 grid, dim3 block, size_t shared_bytes, const Options& options, void (*body)(const void*), const void* closure) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard lock(one_launch_at_a_time);
  all_launches++;
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !threads) throw std::runtime_error("CUDA launch failed: an empty grid or block");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("CUDA launch failed: the grid is too large");
  if (options.cluster < 1 || options.cluster > kLargestCluster || grid.x % options.cluster)
    throw std::runtime_error("CUDA launch failed: the grid is no multiple of the cluster, or the cluster is too large");
  if (threads > 1024 || block.z > 64) throw std::runtime_error("CUDA launch failed: the block is too large");
  const size_t most = std::min(std::max(kSharedBytes, std::exchange(allowed_bytes, 0)), kMostSharedBytes);
  if (shared_bytes > most)
    throw std::runtime_error("CUDA launch failed: more than " + std::to_string(most >> 10) + " KB of shared memory");
  grid_size = grid;
  block_size = block;
  Launch now(shared_bytes, options, body, closure);
  launch = &now;
  now.run();
}

unsigned char* shared_memory() { return launch->current->block->shared; }
void barrier(Site site) { launch->block_barrier(site); }
void cluster_barrier(Site site) { launch->cluster_barrier(site); }
unsigned cluster_rank() { return launch->cluster_rank(); }
void* shared_of_rank(void* own, unsigned rank) { return launch->shared_of_rank(own, rank); }
void yield(Site site) { launch->yield(site); }
uint64_t meet(Meeting what, unsigned mask, uint64_t value, unsigned source_lane, Site site) {
  return launch->meet(what, mask, value, source_lane, site);
}
int acq_rel(Site site) { return launch->acq_rel(site); }
unsigned lane() { return launch->current->lane; }
void waited(Site site) { launch->waited(site); }
bool dropped(Site site) { return launch->dropped(site); }
void copy_later(void* to, const void* from, size_t bytes) { launch->copy_later({to, from, bytes}); }
bool next_copy(void** to, const void** from, size_t* bytes) {
  Thread& self = *launch->current;
  if (self.first_copy == self.end_of_copies) return false;
  const Copy& copy = self.copies[self.first_copy++ % kMostCopies];
  *to = copy.to, *from = copy.from, *bytes = copy.bytes;
  return true;
}
void note_fresh_load() { launch->require_waited("a load of what it may have written"); }

void allow_shared_bytes(size_t bytes) { allowed_bytes = bytes; }

int multiprocessors() {
  const char* text = std::getenv("GCNET_EMULATION_MULTIPROCESSORS");
  return text ? std::max(1, std::atoi(text)) : 1;
}

void count_accesses(bool count) {
  counts.clear();
  counting = count;
}
void note_load(const void* from, size_t bytes) { note(from, bytes, &Counts::loads); }
void note_store(const void* to, size_t bytes) { note(to, bytes, &Counts::stores); }

Traffic traffic_of(const void* start, size_t bytes) {
  Traffic traffic{~0u, 0, ~0u, 0};
  for (size_t i = 0; i < bytes; i++) {
    const auto found = counts.find(reinterpret_cast<uintptr_t>(start) + i);
    const Counts byte = found == counts.end() ? Counts{} : found->second;
    traffic.least_loads = std::min(traffic.least_loads, byte.loads);
    traffic.most_loads = std::max(traffic.most_loads, byte.loads);
    traffic.least_stores = std::min(traffic.least_stores, byte.stores);
    traffic.most_stores = std::max(traffic.most_stores, byte.stores);
  }
  return traffic;
}

}  // namespace gcnet_ext::cuda::emulation
