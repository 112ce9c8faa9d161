// One launch for a whole direction of the block: blocks draw tickets, and each ticket is an item of a stage of a sample
// (ticket_order.h). The last stage of a sample follows its first one by a lag, so that the second-level cache still has the map
// when it is read again. An item waits for items with smaller tickets only, and those are done or in the hands of blocks that
// run: no two blocks need to run at the same time. While a block works on an item, its next one is known, and what that needs of
// the map is on its way to shared memory.
//
// Where blocks form clusters (cluster.cuh), a ticket is for all blocks of a cluster: an item of a stage that shares tiles, or
// one item for each block.
#pragma once

#include "../ticket_order.h"
#include "cluster.cuh"
#include "launch.h"
#include "memory_access.h"

namespace gcnet_ext::cuda {

constexpr int kTicketThreads = 256, kTicketBlocks = 2;  // of a block; of a multiprocessor
template <typename Shape>
constexpr int kTicketCluster = Shape::threads / kTicketThreads;  // the blocks that share a tile of this RowShape

template <int kCluster>
class Tickets {
 public:
  static constexpr int cluster = kCluster;

  // The counters of a launch; the caller fills them with zeros.
  static int64_t counters(const TicketOrder& order) {
    return 1 + static_cast<int64_t>(order.samples()) * order.awaited_stages();
  }

  Tickets(const TicketOrder& order, unsigned* counters) : order_(order), drawn_(counters), done_(counters + 1) {}

  __device__ const TicketOrder& order() const { return order_; }
  // The number of this block's own item, in a stage that has one for each block of a cluster.
  __device__ static unsigned own_item(const Ticket& ticket) { return ticket.item * kCluster + rank(); }
  __device__ static unsigned rank() { return kCluster > 1 ? cluster_rank() : 0; }

  // All threads call this behind their last store of an item.
  __device__ void done(const Ticket& ticket) const {
    __syncthreads();
    if (threadIdx.x == 0) add_release(counter(ticket.stage, ticket.sample), 1);
  }
  // All threads call this before their first load of what the stage before has left. The work of all blocks of the clusters counts.
  __device__ void wait_for_stage_before(const Ticket& ticket) const {
    const int before = ticket.stage - 1;
    if (threadIdx.x == 0) wait_for_count(counter(before, ticket.sample), order_.items(before) * kCluster);
    __syncthreads();
  }

  // All threads call this before their first load of what a stage has left of all samples.
  __device__ void wait_for_all_of(int stage) const {
    for (unsigned n = threadIdx.x; n < order_.samples(); n += blockDim.x)
      wait_for_count(counter(stage, n), order_.items(stage) * kCluster);
    __syncthreads();
  }

  // Works on tickets until there are none. work.copy(ticket) starts the copies that an item needs, and work(ticket, next) works
  // on an item and calls copy(next) as soon as it has taken its own copies. `place` is in shared memory, and so is `next`, which
  // needs no registers there.
  template <typename Work>
  __device__ void work_on(Ticket& place, Work& work) const {
    draw_into(place);
    barrier();
    work.copy(place);
    for (;;) {
      const Ticket ticket = place;
      if (ticket.stage < 0) break;
      barrier();         // everyone has read the ticket, and has done with the shared memory of the item before
      draw_into(place);  // this takes its time while the copies arrive
      barrier();
      work(ticket, place);
    }
    if constexpr (kCluster > 1) cluster_barrier();  // a block must not end while another one reads its shared memory
  }

 private:
  __device__ static void barrier() {
    if constexpr (kCluster > 1) {
      cluster_barrier();
    } else {
      __syncthreads();
    }
  }
  __device__ unsigned* counter(int stage, unsigned sample) const { return done_ + stage * order_.samples() + sample; }
  __device__ void draw_into(Ticket& place) const {
    if (rank() != 0 || threadIdx.x != 0) return;
    const Ticket ticket = order_.at(draw(drawn_));
#pragma unroll
    for (int r = 0; r < kCluster; r++) *(kCluster > 1 ? shared_of_rank(&place, r) : &place) = ticket;
  }

  const TicketOrder order_;
  unsigned *const drawn_, *const done_;  // [1], [awaited stages, N]
};

// Whether code for an architecture has the ticketed kernels: copies to shared memory begin with sm_80, and clusters with sm_90. On
// sm_120 most of them do not find enough registers. A kernel that is not there is empty, and tickets_fit() keeps it from being
// launched.
__host__ __device__ constexpr bool has_tickets(int architecture, int cluster) {
  return architecture >= (cluster > 1 ? 90 : 80) && architecture < 120;
}
template <int kCluster>
__device__ constexpr bool architecture_has_tickets() {
#if defined(__CUDA_ARCH__)
  return has_tickets(__CUDA_ARCH__ / 10, kCluster);
#else
  return true;
#endif
}

// Whether the current device can run such a kernel, and has a second-level cache from which it gains.
template <class... Parameters>
bool tickets_fit(void (*kernel)(Parameters...), int cluster, size_t shared_bytes) {
  constexpr size_t kLeastCache = 24'000'000;  // a smaller one has lost a map when the last stage comes to it (plan_cuda_lag)
  return has_tickets(code_architecture(kernel), cluster) && shared_bytes <= most_shared_bytes() &&
         second_level_cache_bytes() >= kLeastCache;
}

// Launches as many clusters as run at a time, or one per ticket.
template <class... Parameters, class... Arguments>
void launch_tickets(void (*kernel)(Parameters...), int cluster, const TicketOrder& order, size_t shared_bytes,
                    cudaStream_t stream, const Arguments&... arguments) {
  const int64_t clusters = std::max<int64_t>(1, blocks_at_a_time(kTicketBlocks, shared_bytes) / cluster);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(order.tickets(), clusters) * cluster));
  allow_shared_bytes(kernel, shared_bytes);
  launch_clusters(kernel, cluster, grid, dim3(kTicketThreads), shared_bytes, stream, arguments...);
}

}  // namespace gcnet_ext::cuda
