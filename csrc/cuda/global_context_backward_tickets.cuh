// The backward pass of the block in one ticketed launch (tickets.cuh). Its stages, each with the file whose launch does the same in
// the second engine:
//
//   sums           a group of channels of a sample       channel_sums_items.cuh
//   grad_parts     a tile and slice of the weights       transform_split_backward.cuh
//   grad_context   a tile of w1's columns                transform_split_backward.cuh
//   grad_x         a split of a sample                   attention_pool_backward_row_items.cuh
//   parameters     of no sample: a part of a gradient    parameter_gradients.cuh
//
// These share the device functions, and so the bits of every result. g is masked by the bits of a final ReLU wherever it is
// read, so that both stages read the same memory; the first stage also writes the gradient of the residual.
#pragma once

#include <new>

#include "attention_pool_backward.cuh"
#include "channel_sums_items.cuh"
#include "parameter_gradients.cuh"
#include "tickets.cuh"
#include "transform_split_backward.cuh"

namespace gcnet_ext::cuda {

enum BackwardStage { kBackwardSums, kBackwardGradParts, kBackwardGradContext, kBackwardGradX, kBackwardParameters };

template <typename T, typename Shape>
struct BackwardTicketsParams {
  SumsParams<T> sums;
  CudaSumsItems cut;
  TransformBackwardCut<T> transform;  // one sample for each block
  PoolBackwardParams<T> pool;
  ItemTiles tiles;
  GradientParams<T> gradients;
  Tickets<kTicketCluster<Shape>> tickets;
};

template <typename T, typename Shape>
struct BackwardTicketsShared {
  static_assert(Shape::threads % kTicketThreads == 0 && kCudaSweepThreads == kTicketThreads);
  static constexpr int kAccesses = std::max(Shape::rows, kCudaSweepUnroll);
  struct Ahead {  // what the block needs next
    Vector<T, Shape::vector> x[kAccesses * kTicketThreads], grad[kAccesses * kTicketThreads];
  };
  struct Sums {
    acc_t<T> a[kCudaSweepThreads], ab[kCudaSweepThreads];
  };
  struct GradContext {  // room for GradContextShared
    alignas(16) float values[2 * kCudaMostSplitUnits + std::max<int64_t>(kCudaMostSplitUnits, kSumsOfWarps<1>)];
  };

  Ticket ticket;
  union {
    Ahead ahead;
    MatrixGradientShared<acc_t<T>> matrix_gradient;
    VectorGradientShared<acc_t<T>> vector_gradient;
  };
  acc_t<T> weight[Shape::channels];  // of the mask
  union {
    Sums sums;
    GradPartsShared<1> grad_parts;
    GradContext grad_context;
    PoolBackwardTileShared<T, Shape, kTicketCluster<Shape>> tile;
  } stage;
  BackwardTicketsParams<T, Shape> params;  // here for the sake of registers, as in global_context_tickets.cuh
};

// A part of a gradient of a parameter. This is a call, because the other stages need all registers.
template <typename T, typename Shape>
__device__ __attribute__((noinline)) void find_parameter_gradient(BackwardTicketsShared<T, Shape>& shared, unsigned item) {
  const GradientParams<T>& all = shared.params.gradients;
  if (item >= all.blocks()) return;
  const ParameterGradient<T>& of = all.of_block(item);
  const int64_t block = item - of.first_block;
  shared.params.tickets.wait_for_all_of(of.of_previous_launch ? kBackwardGradX : kBackwardGradContext);
  if (of.right.count > 0) {
    matrix_gradient</*kFresh=*/true>(of, block, shared.matrix_gradient);
  } else {
    vector_gradient</*kFresh=*/true>(of, block, shared.vector_gradient);
  }
}

template <typename T, typename Shape>
class BackwardTicketsWork {
  using Sums = SumsItems<T, /*kChannelsLast=*/false>;
  using Rows = PoolBackwardRows<T, Shape, kTicketCluster<Shape>, /*kOnce=*/true>;

 public:
  __device__ explicit BackwardTicketsWork(BackwardTicketsShared<T, Shape>& shared) : params_(shared.params), shared_(shared) {}

  __device__ void copy(const Ticket& ticket) const {
    if (ticket.stage == kBackwardSums) {
      const Sums sums = make_sums();
      copy_piece(sums, first_piece(sums, ticket));
    } else if (ticket.stage == kBackwardGradX) {
      const Rows rows = make_rows();
      const ItemTiles tiles = first_tile(ticket);
      rows.copy_x(tiles);
      rows.copy_grad(tiles);
    }
  }

  __device__ void operator()(const Ticket& ticket, const Ticket& next) const {
    if (ticket.stage == kBackwardParameters)  // behind which nothing is copied
      return find_parameter_gradient(shared_, params_.tickets.own_item(ticket));
    if (ticket.stage == kBackwardGradX) return find_grad_x(ticket, next);
    if (ticket.stage == kBackwardSums) {
      sum(ticket, next);
    } else {
      copy(next);
      transform_backward(ticket);
    }
    params_.tickets.done(ticket);
  }

 private:
  __device__ Sums make_sums() const {
    auto& of_block = shared_.stage.sums;
    const unsigned items = params_.tickets.order().samples() * static_cast<unsigned>(params_.cut.channel_groups);
    return {params_.sums, params_.cut, items, shared_.ahead.grad, shared_.ahead.x, of_block.a, of_block.ab};
  }
  // Every block of a cluster has an item of its own. Behind the last one of the sample there is none.
  __device__ SumsPlace first_piece(const Sums& sums, const Ticket& ticket) const {
    const unsigned groups = static_cast<unsigned>(params_.cut.channel_groups), own = params_.tickets.own_item(ticket);
    return sums.begin(own < groups ? ticket.sample * groups + own : params_.tickets.order().samples() * groups);
  }
  __device__ static void copy_piece(const Sums& sums, const SumsPlace& at) {
    sums.copy_a(at);
    sums.copy_b(at);
  }
  __device__ void sum(const Ticket& ticket, const Ticket& next) const {
    Sums sums = make_sums();
    SumsPlace at = first_piece(sums, ticket);
    const bool there = sums.there(at);
    for (bool last = !there; !last;) {
      last = sums.last_of_item(at);
      const SumsPlace following = sums.next(at);
      sums.work_on(at, [&] {
        if (!last) copy_piece(sums, following);
      });
      if (!last) at = following;
    }
    copy(next);
    if (there) sums.end_item(at);
  }

  __device__ void transform_backward(const Ticket& ticket) const {
    const TransformGradParams<T>& transform = params_.sums.transform_grad;
    const bool parts = ticket.stage == kBackwardGradParts;
    const SplitWork& work = parts ? params_.transform.first : params_.transform.second;
    const unsigned places = work.places(), own = params_.tickets.own_item(ticket);
    if (own >= places) return;
    const SplitPlace place(work, transform.forward.samples, ticket.sample * places + own);
    const auto wait = [&] { params_.tickets.wait_for_stage_before(ticket); };
    if (parts) return find_grad_parts<1>(transform, params_.transform.parts, place, shared_.stage.grad_parts, wait);
    const GradContextUnits units(transform.forward);
    SharedMemory memory{reinterpret_cast<unsigned char*>(shared_.stage.grad_context.values)};
    const GradContextShared<1> shared(memory, units.all);
    if (transform.forward.activation.is_relu_or_silu()) {
      find_grad_context<1, true>(transform, params_.transform.parts, place, units, shared, wait);
    } else {
      find_grad_context<1, false>(transform, params_.transform.parts, place, units, shared, wait);
    }
  }

  __device__ Rows make_rows() const {
    return {params_.pool, params_.tiles, shared_.ahead.x, shared_.ahead.grad, shared_.weight, shared_.stage.tile};
  }
  __device__ unsigned split_of(const Ticket& ticket) const { return ticket.sample * params_.tiles.splits + ticket.item; }
  __device__ ItemTiles first_tile(const Ticket& ticket) const {
    ItemTiles tiles = params_.tiles;
    tiles.begin(split_of(ticket));
    return tiles;
  }
  // The places of x are free before those of g.
  __device__ void find_grad_x(const Ticket& ticket, const Ticket& next) const {
    Rows rows = make_rows();
    ItemTiles tiles = first_tile(ticket);
    const unsigned following = next.stage == kBackwardGradX ? split_of(next) : tiles.items;
    const bool sums_follow = next.stage == kBackwardSums;
    for (bool last = false; !last;) {
      last = tiles.last_of_item();
      const auto of_positions = rows.of_positions(tiles);
      if (tiles.first_of_item()) {
        params_.tickets.wait_for_stage_before(ticket);
        rows.begin_item(ticket.sample);
      }
      const ItemTiles then = tiles.next(following);
      rows.work_on(tiles, of_positions, then, [&] {
        rows.copy_x(then);
        if (last && sums_follow) {
          const Sums sums = make_sums();
          sums.copy_b(first_piece(sums, next));
        }
      });
      if (last) {
        if (sums_follow) {
          const Sums sums = make_sums();
          sums.copy_a(first_piece(sums, next));
        }
        rows.end_item(tiles);
        if (params_.gradients.count > 0) params_.tickets.done({kBackwardGradX, tiles.item / tiles.splits, 0});
      }
      tiles = then;
    }
  }

  const BackwardTicketsParams<T, Shape>& params_;
  BackwardTicketsShared<T, Shape>& shared_;
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(kTicketThreads, kTicketBlocks)
    global_context_backward_tickets(BackwardTicketsParams<T, Shape> params) {
  if constexpr (architecture_has_tickets<kTicketCluster<Shape>>()) {
    auto& shared = shared_memory<BackwardTicketsShared<T, Shape>>();
    PoolBackwardRows<T, Shape, kTicketCluster<Shape>, true>::load_weight(params.pool, shared.weight);
    if (threadIdx.x == 0) new (&shared.params) BackwardTicketsParams<T, Shape>(params);
    const BackwardTicketsWork<T, Shape> work(shared);
    shared.params.tickets.work_on(shared.ticket, work);
  }
}

// ---- the launch --------------------------------------------------------------------------------------------------------------

// The order of the tickets, each of which is for a cluster of blocks.
template <typename T>
TicketOrder backward_ticket_order(const SumsParams<T>& sums, const CudaSumsItems& cut, const SplitWork& first,
                                  const SplitWork& second, int64_t splits, int64_t gradients, int cluster) {
  const auto of_cluster = [&](int64_t items) { return (items + cluster - 1) / cluster; };
  const Extent& extent = sums.extent;
  const int64_t of_sums = of_cluster(cut.channel_groups),
                maps = sums.b.data ? 2 : 1;  // of those that both the first and the last stage read: x and g, or g alone
  const int64_t bytes = maps * extent.channels * extent.positions * static_cast<int64_t>(sizeof(T));
  const int64_t lag = plan_cuda_lag(bytes, extent.samples, (bytes + of_sums - 1) / of_sums, tuning());
  return {
      extent.samples, {of_sums, of_cluster(first.places()), of_cluster(second.places()), splits}, lag, of_cluster(gradients)};
}

// Launches the backward pass, if it fits into a ticketed launch, and returns whether it does. Of the params, this sets what
// mask_gradient() decides for other launches. To the gradients it adds that of the weight of the mask.
template <typename T>
bool launch_backward_tickets(SumsParams<T> sums, PoolBackwardParams<T> pool, const uint8_t* positive,
                             const Map<T>& grad_residual, const MutableParameter<T>& grad_weight, GradientParams<T>& gradients,
                             Workspace& workspace, cudaStream_t stream) {
  bool taken = false;
  if constexpr (!std::is_same_v<T, double>) {
    const Extent& extent = pool.extent;
    sums.positive = pool.positive = positive;
    if (positive) sums.fused = grad_residual;
    if (extent.samples == 0 || !pool.weight.data || !(pool.grad_x.data || grad_weight.data)) return false;
    if (!transform_is_split(sums.transform_grad.forward) || !sums_by_items(sums)) return false;
    const CudaPoolPlan plan = pool_backward_plan(pool);
    const CudaSumsItems cut = plan_cuda_sums_items(common_shape<T>(extent, sums.a, sums.b, sums.fused), tuning());
    if (plan_cuda_cluster(extent.channels, plan, tuning()) == 0 || cut.splits > 1) return false;
    with_row_backward_item_shape<T>(plan, [&](auto shape) {
      using Shape = decltype(shape);
      constexpr int kCluster = kTicketCluster<Shape>;
      constexpr auto kernel = global_context_backward_tickets<T, Shape>;
      const size_t shared = shared_bytes<BackwardTicketsShared<T, Shape>>();
      auto transform = TransformBackwardCut<T>(sums.transform_grad.forward).of_samples();
      const int64_t of_sample = cut.channel_groups + transform.first.places() + transform.second.places() + plan.splits;
      if (!tickets_fit(kernel, kCluster, shared) || !TicketOrder::fits(extent.samples, of_sample)) return;

      taken = true;
      transform.parts.values = workspace.take<float>(transform.parts_of(extent.samples));
      keep_weight_gradient(pool, plan, grad_weight, gradients, workspace);
      const TicketOrder order =
          backward_ticket_order(sums, cut, transform.first, transform.second, plan.splits, gradients.blocks(), kCluster);
      pool.hints = tuning().hints != 1;
      const ItemTiles tiles(extent.samples, extent.positions, plan.splits, plan.tile_positions);
      unsigned* const counters = workspace.zeros(Tickets<kCluster>::counters(order), stream);
      launch_tickets(kernel, kCluster, order, shared, stream,
                     BackwardTicketsParams<T, Shape>{sums, cut, transform, pool, tiles, gradients, {order, counters}});
    });
  }
  return taken;
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_backward_tickets)

}  // namespace gcnet_ext::cuda
