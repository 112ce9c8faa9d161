// The forward pass of the block in one launch (tickets.cuh). Its stages are those of the second engine, with the same device
// functions, and so the same bits:
//
//   pool      a split of a sample and all of its tiles                   attention_pool_row_items.cuh
//   hidden    a slice of the channels, a tile of the hidden units        transform_split.cuh
//   outputs   a tile of the outputs of a branch                          transform_split.cuh
//   fusion    a piece of a sample, from the last one to the first        channel_fuse_items.cuh
//
// Two blocks of a cluster share the tiles of the pool that are made for 512 threads; of the other stages, each has an item of its
// own.
#pragma once

#include <new>

#include "attention_pool_row_items.cuh"
#include "channel_fuse_items.cuh"
#include "tickets.cuh"
#include "transform_split.cuh"

namespace gcnet_ext::cuda {

namespace forward_stage {
enum : int { pool, hidden, outputs, fusion };
}

template <typename T, typename Shape>
struct ForwardTicketsParams {
  PoolParams<T> pool;
  ItemTiles tiles;
  SliceParts parts;
  SplitWork hidden, outputs;
  Fusion<T> fusion;
  RowSegments samples;  // a segment is a sample
  unsigned pieces;      // of a sample
  bool evicts;          // the caches may forget first what the fusion has read
  Tickets<kTicketCluster<Shape>> tickets;
};

template <typename T, typename Shape>
struct ForwardTicketsShared {
  // The next tile, or the next pieces of x and the residual.
  Vector<T, Shape::vector> stage[std::max(Shape::rows, 2 * kCudaSweepUnroll) * kTicketThreads];
  acc_t<T> weight[Shape::channels + 1];  // of the mask, and its bias
  union {
    PoolRowSums<T, Shape> sums;
    ContextSlice<1> slice;
    alignas(16) float hidden[kCudaMostSplitUnits];
  };
  Ticket ticket;
  // Read here instead of where the launch has left it, this is loaded when it is needed. Otherwise the compiler would load it
  // once and keep it in registers, for all stages together, while the pool needs them for its tile.
  ForwardTicketsParams<T, Shape> params;
};

template <typename T, typename Shape>
class ForwardTickets {
  using Split = PoolRowSplit<T, Shape, kTicketCluster<Shape>>;

 public:
  __device__ explicit ForwardTickets(ForwardTicketsShared<T, Shape>& shared) : params_(shared.params), shared_(shared) {}

  __device__ void copy(const Ticket& ticket) const {
    if (ticket.stage == forward_stage::pool) Split::copy(params_.pool, shared_.stage, tiles_of(ticket));
    if (ticket.stage == forward_stage::fusion && own_item(ticket) < params_.pieces) {
      const FuseRows<T> rows = fuse_rows();
      rows.copy(piece_of(ticket, rows), Eviction::first(params_.evicts));
    }
  }

  __device__ void operator()(const Ticket& ticket, const Ticket& next) const {
    switch (ticket.stage) {
      case forward_stage::pool: return sum_split(ticket, next);
      case forward_stage::hidden: return find_hidden(ticket, next);
      case forward_stage::outputs: return find_outputs_of_branch(ticket, next);
      default: return fuse_piece(ticket, next);
    }
  }

 private:
  __device__ unsigned own_item(const Ticket& ticket) const { return params_.tickets.own_item(ticket); }

  __device__ ItemTiles tiles_of(const Ticket& ticket) const {
    ItemTiles tiles = params_.tiles;
    tiles.begin(ticket.sample * tiles.splits + ticket.item);
    return tiles;
  }
  __device__ void sum_split(const Ticket& ticket, const Ticket& next) const {
    Split split(params_.pool, shared_.weight, shared_.sums);
    int64_t first = tiles_of(ticket).first;
    // The tile is put together wherever it is needed, because its numbers would take registers that the sums need.
    const auto tile = [&] {
      ItemTiles tiles = tiles_of(ticket);
      tiles.first = first;
      return tiles;
    };
    for (bool last = false; !last;) {
      split.take(shared_.stage, tile());
      last = tile().last_of_item();
      if (last) {
        copy(next);
      } else {
        Split::copy(params_.pool, shared_.stage, tile().next(/*following=*/0));
      }
      split.add(tile());
      if (!last) first = tile().next(/*following=*/0).first;
    }
    split.put(tile());
    params_.tickets.done(ticket);
  }

  // Calls body with the place of this block's own item, if it has one.
  template <typename Body>
  __device__ void with_place(const Ticket& ticket, const SplitWork& work, const Body& body) const {
    const unsigned places = work.places(), item = own_item(ticket);
    if (item < places) body(SplitPlace(work, params_.pool.extent.samples, ticket.sample * places + item));
  }
  __device__ void find_hidden(const Ticket& ticket, const Ticket& next) const {
    copy(next);
    with_place(ticket, params_.hidden, [&](const SplitPlace& place) {
      find_hidden_parts(params_.pool, params_.parts, params_.hidden, place, shared_.slice,
                        [&] { params_.tickets.wait_for_stage_before(ticket); });
    });
    params_.tickets.done(ticket);
  }
  __device__ void find_outputs_of_branch(const Ticket& ticket, const Ticket& next) const {
    copy(next);
    const TransformParams<T>& transform = params_.pool.transform;
    const auto wait = [&] { params_.tickets.wait_for_stage_before(ticket); };
    with_place(ticket, params_.outputs, [&](const SplitPlace& place) {
      if (transform.activation.is_relu_or_silu()) {
        find_outputs<1, true>(transform, params_.parts, params_.outputs, place, shared_.hidden, wait);
      } else {
        find_outputs<1, false>(transform, params_.parts, params_.outputs, place, shared_.hidden, wait);
      }
    });
    params_.tickets.done(ticket);
  }

  __device__ FuseRows<T> fuse_rows() const {
    SharedMemory memory{reinterpret_cast<unsigned char*>(shared_.stage)};
    return {params_.fusion, params_.samples, FuseStage<T>(memory, /*has_x=*/true, params_.fusion.residual.data != nullptr)};
  }
  __device__ FusePiece piece_of(const Ticket& ticket, const FuseRows<T>& rows) const {
    return rows.piece(ticket.sample, params_.pieces - 1 - own_item(ticket));
  }
  __device__ void fuse_piece(const Ticket& ticket, const Ticket& next) const {
    FuseRows<T> rows = fuse_rows();
    rows.take();
    copy(next);
    params_.tickets.wait_for_stage_before(ticket);
    if (own_item(ticket) < params_.pieces) rows.template put</*kOnce=*/true>(piece_of(ticket, rows));
  }

  const ForwardTicketsParams<T, Shape>& params_;
  ForwardTicketsShared<T, Shape>& shared_;
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(kTicketThreads, kTicketBlocks)
    global_context_tickets(const ForwardTicketsParams<T, Shape> params) {
  if constexpr (architecture_has_tickets<kTicketCluster<Shape>>()) {
    auto& shared = shared_memory<ForwardTicketsShared<T, Shape>>();
    PoolRowSplit<T, Shape, kTicketCluster<Shape>>::load_weight(params.pool, shared.weight);
    if (threadIdx.x == 0) new (&shared.params) ForwardTicketsParams<T, Shape>(params);
    const ForwardTickets<T, Shape> work(shared);
    shared.params.tickets.work_on(shared.ticket, work);
  }
}

// Launches the forward pass, if the maps and the current device allow it, and returns whether they do. The transform is split; of
// the params, all is set but what the splits leave and the shares of valid.
template <typename T>
bool launch_global_context_tickets(PoolParams<T> pool, Fusion<T> fusion, Workspace& workspace, cudaStream_t stream) {
  bool launched = false;
  if constexpr (!std::is_same_v<T, double>) {
    const Extent& extent = pool.extent;
    const TransformParams<T>& transform = pool.transform;
    const BranchParams<T>&scale = transform.branch[kScale], &shift = transform.branch[kShift];
    if (!pool.weight.data || extent.elements() == 0 || transform.units == 0) return false;
    const CudaPoolPlan plan = plan_cuda_pool(common_shape<T>(extent, pool.x), tuning());
    const bool wide = row_segments<T>(extent, fusion.x, fusion.residual, fusion.out).wide;
    if (plan_cuda_cluster(extent.channels, plan, tuning()) == 0 || !wide) return false;
    if (extent.samples * extent.channels > kCudaMaxBlocks) return false;  // rows are counted in 32 bits
    const SliceParts slices(extent.channels, scale.units, shift.units);
    const auto work = [&](int slices, int tiles_of_scale, int tiles_of_shift) {
      return SplitWork(extent.samples, slices, tiles_of_scale, tiles_of_shift, /*in_turns=*/true, /*most_together=*/1);
    };
    const SplitWork hidden =
        work(slices.slices, split_tiles(scale.units, kSplitRowTile), split_tiles(shift.units, kSplitRowTile));
    const int rows = split_tiles(extent.channels, kSplitRowTile);
    const SplitWork outputs = work(/*slices=*/1, scale.units > 0 ? rows : 0, shift.units > 0 ? rows : 0);
    const int64_t sample_elements = extent.channels * extent.positions;
    const int64_t pieces = (sample_elements + kFusePiece<T> - 1) / kFusePiece<T>;
    if (!TicketOrder::fits(extent.samples, plan.splits + hidden.places() + outputs.places() + pieces)) return false;
    const int64_t item_positions = plan.tile_positions * plan.tiles_per_split;
    const int64_t lag =
        plan_cuda_lag(sample_elements * sizeof(T), extent.samples, extent.channels * item_positions * sizeof(T), tuning());
    with_row_item_shape<T>(plan, [&](auto shape) {
      using Shape = decltype(shape);
      if constexpr (Shape::channels <= kCudaTicketChannels) {
        constexpr int kCluster = kTicketCluster<Shape>;
        const auto of_cluster = [](int64_t items) { return (items + kCluster - 1) / kCluster; };
        const TicketOrder order(
            extent.samples, {plan.splits, of_cluster(hidden.places()), of_cluster(outputs.places()), of_cluster(pieces)}, lag);
        const auto kernel = global_context_tickets<T, Shape>;
        const size_t shared = shared_bytes<ForwardTicketsShared<T, Shape>>();
        if (!tickets_fit(kernel, kCluster, shared)) return;
        launched = true;
        pool.valid = with_shares(pool.valid, extent, workspace, stream);
        pool.splits = static_cast<unsigned>(plan.splits);
        pool.partial = workspace.take<float>(extent.samples * plan.splits * (extent.channels + 2));
        SliceParts parts = slices;
        parts.values = workspace.take<float>(extent.samples * parts.slices * parts.width);
        unsigned* const counters = workspace.zeros(Tickets<kCluster>::counters(order), stream);
        uint8_t* const bits = fusion.positive;
        const bool bits_of_access = extent.positions % 8 == 0;
        if (!bits_of_access) fusion.positive = nullptr;  // a byte does not belong to one access, or to two neighbours
        const ForwardTicketsParams<T, Shape> params{
            pool,
            ItemTiles(extent.samples, extent.positions, plan.splits, plan.tile_positions),
            parts,
            hidden,
            outputs,
            fusion,
            {extent.samples, extent.channels, wide},
            static_cast<unsigned>(pieces),
            tuning().hints != 1,
            {order, counters}};
        launch_tickets(kernel, kCluster, order, shared, stream, params);
        if (bits && !bits_of_access) launch_positive_bits(read_only(fusion.out), extent, bits, stream);
      }
    });
  }
  return launched;
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_global_context_tickets)

}  // namespace gcnet_ext::cuda
