// The order of tickets (csrc/ticket_order.h), and what a launch does that works on them (csrc/cuda/tickets.cuh).
#include "../../../csrc/cuda/shared_memory.cuh"
#include "../../../csrc/cuda/tickets.cuh"
#include "kernel_test.h"

namespace kernel_test {
namespace {

using namespace gcnet_ext;
using namespace gcnet_ext::cuda;

int64_t random_up_to(int64_t most) { return static_cast<int64_t>((random_number() + 1) / 2 * (most + 1)); }

void check(bool holds, const char* what) {
  comparisons++;
  if (holds) return;
  failures++;
  std::printf("FAILED: %s\n", what);
}

struct Sizes {
  int64_t samples;
  std::vector<int64_t> items;
  int64_t lag, of_no_sample;

  static Sizes random() {
    Sizes sizes{random_up_to(6), {1 + random_up_to(9)}, 0, random_up_to(3)};
    for (int64_t more = 1 + random_up_to(3); more > 0; more--) sizes.items.push_back(1 + random_up_to(12));
    sizes.lag = random_up_to(1) ? random_up_to(9) : random_up_to(sizes.samples * sizes.items[0]);
    return sizes;
  }
  TicketOrder order() const {
    const auto& c = items;
    switch (c.size()) {
      case 2: return {samples, {c[0], c[1]}, lag, of_no_sample};
      case 3: return {samples, {c[0], c[1], c[2]}, lag, of_no_sample};
      case 4: return {samples, {c[0], c[1], c[2], c[3]}, lag, of_no_sample};
      default: return {samples, {c[0], c[1], c[2], c[3], c[4]}, lag, of_no_sample};
    }
  }
};

// Every item has one ticket, in the order of its stage, and everything that it needs has smaller ones; those of no sample come last.
void check_order(const Sizes& sizes) {
  const TicketOrder order = sizes.order();
  const auto stages = static_cast<int>(sizes.items.size());
  std::vector<int64_t> done(stages);  // items of each stage
  bool in_turn = true, later = true;
  int64_t all = 0;
  for (const int64_t items : sizes.items) all += sizes.samples * items;
  for (int64_t number = 0; number < all && in_turn; number++) {
    const Ticket ticket = order.at(static_cast<unsigned>(number));
    in_turn = ticket.stage >= 0 && ticket.stage < stages && ticket.sample < sizes.samples;
    if (!in_turn) break;
    const int64_t items = sizes.items[ticket.stage];
    in_turn = ticket.item < items && ticket.sample * items + ticket.item == done[ticket.stage];
    done[ticket.stage]++;
    if (ticket.stage > 0) later &= done[ticket.stage - 1] >= (ticket.sample + 1) * sizes.items[ticket.stage - 1];
  }
  check(in_turn, "every item has a ticket, in the order of its stage");
  check(later, "all items of the stage before have smaller tickets");
  bool last = order.tickets() == all + sizes.of_no_sample;
  for (int64_t item = 0; item < sizes.of_no_sample; item++) {
    const Ticket ticket = order.at(static_cast<unsigned>(all + item));
    last &= ticket.stage == stages && ticket.item == item;
  }
  check(last, "the items of no sample come behind all others");
  check(order.at(order.tickets()).stage < 0, "behind the last ticket there is no work");
}

// The first item of the last stage comes as soon as the first sample and the lag are over, and then one for every two items of the
// first stage, where a sample has twice as many of these.
void check_lag(int64_t lag) {
  constexpr int64_t kSamples = 6, kFirst = 4, kLast = 2;
  const TicketOrder order(kSamples, {kFirst, 3, kLast}, lag);
  int64_t first = 0, last = 0;
  bool follows = true;
  for (unsigned number = 0; order.at(number).stage >= 0; number++) {
    const int stage = order.at(number).stage;
    first += stage == 0;
    if (stage != 2) continue;
    follows &= std::abs(first - std::min(kFirst + lag + 2 * last, kSamples * kFirst)) <= 2;
    last++;
  }
  check(follows && last == kSamples * kLast, "the last stage follows the first one by the lag");
}

// A toy of three stages: the squares of x, their sum over a sample, and x divided by that; and of items of no sample, each of which
// adds the sums of all samples. In a cluster, every block stores what its neighbour has found.
struct ToyShared {
  Ticket ticket;
  Vector<float, 4> stage[32];
  float kept[32];
};
template <int kCluster>
struct Toy {
  const float* x;  // [N, items * 128 * kCluster]
  float *squares, *sums, *out, *totals;
  Tickets<kCluster> tickets;
  int64_t items;

  struct Work {
    const Toy& toy;
    ToyShared& shared;

    __device__ const float* source(const Ticket& ticket) const {
      return toy.x + ((ticket.sample * toy.items * kCluster + toy.tickets.own_item(ticket)) * 32 + threadIdx.x) * 4;
    }
    __device__ void copy(const Ticket& ticket) const {
      if (ticket.stage == 0 || ticket.stage == 2) copy_later(shared.stage + threadIdx.x, source(ticket), true);
    }
    // What the neighbour in the cluster has in this place.
    __device__ float of_neighbour(float& own) const {
      if constexpr (kCluster == 1) return own;
      return *shared_of_rank(&own, neighbour());
    }
    __device__ unsigned neighbour() const { return (toy.tickets.rank() + 1) % kCluster; }
    __device__ void operator()(const Ticket& ticket, const Ticket& next) {
      const int64_t parts = toy.items * kCluster * 32;
      wait_for_copies();
      const Vector<float, 4> values = shared.stage[threadIdx.x];
      copy(next);
      float& own = shared.kept[threadIdx.x];
      if (ticket.stage == 0) {
        own = 0;
        for (const float value : values.data) own += value * value;
        if constexpr (kCluster > 1) cluster_barrier();
        const int64_t item = ticket.sample * toy.items * kCluster + ticket.item * kCluster + neighbour();
        toy.squares[item * 32 + threadIdx.x] = of_neighbour(own);
        toy.tickets.done(ticket);
        return;
      }
      if (ticket.stage == 3) {
        toy.tickets.wait_for_all_of(1);
        if (threadIdx.x == 31) {  // another thread than the one that waited for most of them
          float total = 0;
          for (unsigned n = 0; n < toy.tickets.order().samples(); n++) total += load_fresh(toy.sums + n);
          toy.totals[toy.tickets.own_item(ticket)] = total;
        }
        return;
      }
      toy.tickets.wait_for_stage_before(ticket);
      if (ticket.stage == 1) {
        if (threadIdx.x == 0 && toy.tickets.rank() == 0) {
          float sum = 0;
          for (int64_t i = 0; i < parts; i++) sum += load_fresh(toy.squares + ticket.sample * parts + i);
          toy.sums[ticket.sample] = sum;
        }
        toy.tickets.done(ticket);
        return;
      }
      own = load_fresh(toy.sums + ticket.sample);
      if constexpr (kCluster > 1) cluster_barrier();
      const float sum = of_neighbour(own);
      Vector<float, 4> result;
      for (int j = 0; j < 4; j++) result.data[j] = values.data[j] / sum;
      store_vector(toy.out + (source(ticket) - toy.x), result);
    }
  };
};

template <int kCluster>
__global__ void toy_kernel(Toy<kCluster> toy) {
  auto& shared = shared_memory<ToyShared>();
  typename Toy<kCluster>::Work work{toy, shared};
  toy.tickets.work_on(shared.ticket, work);
}

template <int kCluster>
void check_toy(int64_t samples, int64_t items, int64_t lag, int clusters, int64_t of_no_sample) {
  const int64_t elements = items * 128 * kCluster;
  const std::vector<float> x = random_values<float>(samples * elements);
  std::vector<float> squares = unwritten<float>(samples * items * kCluster * 32), sums = unwritten<float>(samples);
  std::vector<float> out = unwritten<float>(samples * elements), totals = unwritten<float>(of_no_sample * kCluster);
  const TicketOrder order(samples, {items, 1, items}, lag, of_no_sample);
  std::vector<unsigned> counters(Tickets<kCluster>::counters(order));
  const Toy<kCluster> toy{x.data(), squares.data(), sums.data(), out.data(), totals.data(), {order, counters.data()}, items};
  launch_clusters(toy_kernel<kCluster>, kCluster, dim3(clusters * kCluster), dim3(32), shared_bytes<ToyShared>(), nullptr, toy);
  Comparison all("tickets: x divided by the sum of its squares", 1e-5);
  double total = 0;
  for (int64_t n = 0; n < samples; n++) {
    double sum = 0;
    for (int64_t i = 0; i < elements; i++) sum += static_cast<double>(x[n * elements + i]) * x[n * elements + i];
    for (int64_t i = 0; i < elements; i++) all.add(out[n * elements + i], x[n * elements + i] / sum);
    total += sum;
  }
  Comparison of_all("tickets: the sum over all samples", 1e-5);
  for (const float found : totals) of_all.add(found, total);
}

// A wait for work that no block has been given ends in an error, and not in a launch that never ends.
void check_lost_ticket() {
  constexpr int64_t kElements = 3 * 128;
  const std::vector<float> x = random_values<float>(kElements);
  std::vector<float> squares = unwritten<float>(3 * 32), sums = unwritten<float>(1), out = unwritten<float>(kElements), none;
  const TicketOrder order(1, {3, 1, 3}, 0);
  std::vector<unsigned> counters(Tickets<1>::counters(order));
  counters[0] = 1;  // the first ticket, as if someone had drawn it
  const Toy<1> toy{x.data(), squares.data(), sums.data(), out.data(), none.data(), {order, counters.data()}, 3};
  std::string error;
  try {
    launch_clusters(toy_kernel<1>, 1, dim3(2), dim3(32), shared_bytes<ToyShared>(), nullptr, toy);
  } catch (const std::runtime_error& thrown) {
    error = thrown.what();
  }
  check(error.find("nobody gets on") != std::string::npos, "a wait for nobody is noticed");
}

}  // namespace

void test_tickets(bool small) {
  for (int i = 0; i < (small ? 1000 : 10000); i++) check_order(Sizes::random());
  for (const int64_t lag : {0, 3, 8, 24}) check_lag(lag);
  check_lost_ticket();
  for (const int clusters : {1, 3, 7}) {
    for (const int64_t lag : {0, 2, 100}) {
      check_toy<1>(5, 3, lag, clusters, 3);
      check_toy<2>(5, 3, lag, clusters, 3);
      check_toy<4>(3, 2, lag, clusters, 0);
    }
  }
}

}  // namespace kernel_test
