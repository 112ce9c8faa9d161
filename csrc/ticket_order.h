// The order in which the work of a ticketed launch is handed out (csrc/cuda/tickets.cuh): a closed form, so that a block finds
// the work of a ticket by itself, with three divisions. There is no CUDA in here.
//
// A sample goes through stages, each of which has the same number of items for every sample; an item of a stage needs all items
// of the stage before it of its sample. The order is a row of rounds. Round i has, of a stage with c items per sample that
// begins `lag` items late, its items i c - lag to (i + 1) c - lag - 1, counted over all samples, as far as there are such. The
// first stage is never late. All others are late by at least as many whole rounds as the stage before them, and by one at
// least: a round begins with the items of the stages between the first and the last, so that those of the last may stand in the
// same round. Behind them, the items of the first and of the last stage alternate at a steady pace. So everything that an item
// needs has a smaller ticket, whatever the sizes are, and tickets are drawn in order by blocks that run: whoever holds the
// smallest ticket that is not done waits for nobody. Behind all rounds there may be items that belong to no sample, such as sums
// over all of them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#if defined(__CUDACC__)
#define GCNET_EXT_HOST_DEVICE __host__ __device__
#else
#define GCNET_EXT_HOST_DEVICE
#endif

namespace gcnet_ext {

struct Ticket {
  int stage;  // -1: there is no work left; TicketOrder::stages(): an item of no sample
  unsigned sample, item;
};

class TicketOrder {
 public:
  static constexpr int kMostStages = 5;

  // items[k]: of stage k and a sample; stages: two at least. lag: how many items of the first stage the last one stays behind, in
  // addition to a sample. of_no_sample: how many items belong to no sample.
  TicketOrder(int64_t samples, std::initializer_list<int64_t> items, int64_t lag, int64_t of_no_sample = 0)
      : samples_(static_cast<unsigned>(samples)),
        of_no_sample_(static_cast<unsigned>(of_no_sample)),
        stages_(static_cast<int>(items.size())) {
    std::copy(items.begin(), items.end(), items_);
    const int64_t first = items_[0], last = items_[stages_ - 1], most = samples * first;
    lag = std::clamp<int64_t>(lag, 0, most);
    for (int k = 1; k + 1 < stages_; k++) lag_[k] = items_[k];
    lag_[stages_ - 1] = static_cast<unsigned>(last + lag * last / first);
    find_spans();
  }

  // Whether an unsigned is enough for all that is counted.
  static bool fits(int64_t samples, int64_t items_of_sample) {
    return items_of_sample <= UINT16_MAX && 2 * (samples + 2) * items_of_sample < INT32_MAX;
  }

  GCNET_EXT_HOST_DEVICE unsigned samples() const { return samples_; }
  GCNET_EXT_HOST_DEVICE int stages() const { return stages_; }
  // The items of a stage and a sample.
  GCNET_EXT_HOST_DEVICE unsigned items(int stage) const { return items_[stage]; }

  // The stages for which others wait.
  GCNET_EXT_HOST_DEVICE int awaited_stages() const { return of_no_sample_ > 0 ? stages_ : stages_ - 1; }

  GCNET_EXT_HOST_DEVICE unsigned tickets() const { return end_ + of_no_sample_; }
  // The work of a ticket.
  GCNET_EXT_HOST_DEVICE Ticket at(unsigned ticket) const {
    if (ticket >= end_) return {ticket - end_ < of_no_sample_ ? stages_ : -1, 0, ticket - end_};
    int s = 0;
    while (s + 1 < spans_ && ticket >= span_[s + 1].first_ticket) s++;
    const Span& span = span_[s];
    const unsigned since = ticket - span.first_ticket, rounds = since / span.tickets, round = span.first_round + rounds;
    unsigned place = since - rounds * span.tickets;
    for (int k = 1; k + 1 < stages_; k++) {
      if (place < span.items[k]) return of_round(k, round, place);
      place -= span.items[k];
    }
    // Of every both = first + last places, those of the last stage are where place * last / both is about to rise.
    const int k = stages_ - 1;
    const unsigned last = span.items[k], both = span.items[0] + last, before = place * last / both;
    if (place * last - before * both + last >= both) return of_round(k, round, before);
    return of_round(0, round, place - before);
  }

 private:
  // Rounds that have the same numbers of items of each stage.
  struct Span {
    unsigned first_ticket, first_round;
    unsigned items[kMostStages], tickets;  // of a round
  };
  static constexpr int kMostSpans = 9;  // between 10 rounds: all stages but the first and the last begin and end together

  // The items of a stage before a round, of all samples.
  GCNET_EXT_HOST_DEVICE unsigned before(int stage, unsigned round) const {
    const unsigned rounds = round < 2 * samples_ + 2 ? round : 2 * samples_ + 2, started = rounds * items_[stage];
    const unsigned all = samples_ * items_[stage], begun = started < lag_[stage] ? 0 : started - lag_[stage];
    return begun < all ? begun : all;
  }
  GCNET_EXT_HOST_DEVICE Ticket of_round(int stage, unsigned round, unsigned place) const {
    const unsigned number = before(stage, round) + place, sample = number / items_[stage];
    return {stage, sample, number - sample * items_[stage]};
  }

  // A stage changes what it has in a round where it begins, in the round after that, and at its end in the same way.
  void find_spans() {
    std::array<unsigned, 4 * kMostStages> rounds{};  // those of stages that are not there are 0, as the first is
    unsigned* next = rounds.data();
    for (int k = 0; k < stages_; k++) {
      const unsigned late = lag_[k] / items_[k];
      for (const unsigned round : {late, late + 1, samples_ + late, samples_ + late + 1}) *next++ = round;
    }
    std::sort(rounds.begin(), rounds.end());
    const auto end = std::unique(rounds.begin(), rounds.end());
    for (auto round = rounds.begin(); round + 1 != end; ++round) {
      Span span{end_, *round, {}, 0};
      for (int k = 0; k < stages_; k++) {
        span.items[k] = before(k, *round + 1) - before(k, *round);
        span.tickets += span.items[k];
      }
      if (span.tickets == 0) continue;
      end_ += (round[1] - *round) * span.tickets;
      span_[spans_++] = span;
    }
  }

  unsigned samples_, of_no_sample_;
  int stages_, spans_ = 0;
  unsigned end_ = 0;  // the tickets of all samples
  unsigned items_[kMostStages] = {}, lag_[kMostStages] = {};
  Span span_[kMostSpans] = {};
};

}  // namespace gcnet_ext
