// How a sample is cut into blocks, and its groups into parts. All of it follows from the shape of a sample: neither the
// batch nor the GPU's size changes what is added to what.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>

#include "../common/group_norm_silu.h"
#include "../common/host_device.h"
#include "block.h"

namespace rftcore::cuda {

constexpr int kThreads = 256;

// Where channels are neighbours, a block takes a chunk of positions of a tile of channels: whole groups, or where one
// is too large a piece of one. Where a channel's positions are neighbours, a team of lanes takes a chunk of these, and
// each channel is a piece of its group.
// 32 bits: a GPU takes long for a division of 64.
struct Cut {
  int channels, per_group, positions;  // of a sample
  int chunks, chunk_positions;
  int tiles, tile_channels;
  int tile_groups;             // 1 where a tile is a piece of a group
  int pieces, piece_channels;  // of a group
  int columns, rows;           // threads along channels, a vector each, and along positions; or lanes and teams

  RFTCORE_HOST_DEVICE int parts() const { return chunks * pieces; }  // of a group

  RFTCORE_HOST_DEVICE int positions_of(int chunk) const {
    const int left = positions - chunk * chunk_positions;
    return left < chunk_positions ? (left < 0 ? 0 : left) : chunk_positions;
  }

  RFTCORE_HOST_DEVICE int channels_of(int piece) const {
    const int left = per_group - piece * piece_channels;
    return left < piece_channels ? left : piece_channels;
  }

  // Elements of a group's part, in a type that holds as many; parts are in the order (chunk, piece).
  template <class T>
  RFTCORE_HOST_DEVICE T count(int part) const {
    if (pieces == 1) return T(positions_of(part)) * T(per_group);
    return T(positions_of(part / pieces)) * T(channels_of(part % pieces));
  }

  int threads() const { return (columns * rows + kWarp - 1) / kWarp * kWarp; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Fewest channels that are whole groups and whole vectors.
inline int64_t unit_channels(const group_norm_silu::Problem& p, int vector) {
  return std::lcm(p.channels_per_group(), int64_t(vector));
}

// A row of a block is at least so long: whole sectors, and few groups to be merged by every block.
constexpr int64_t kTileBytes = 128;
// What a block reads of x: enough to pay for its prologue.
constexpr int64_t kChunkBytes = 32768;
// Every block of the second launch merges all parts of its groups.
constexpr int kMaxParts = 256;
// No more vectors of a piece of a group.
constexpr int kPieceVectors = 64;
// Loads that a thread has in flight.
constexpr int kLoads = 4;

// Whether tiles of vectors can be cut at all.
inline bool fits_vectors(const group_norm_silu::Problem& p, int vector) {
  if (!p.channels_last) return p.positions % vector == 0;
  if (p.channels % vector) return false;
  return unit_channels(p, vector) <= kThreads * int64_t(vector) || p.channels_per_group() % vector == 0;
}

inline Cut empty_cut(const group_norm_silu::Problem& p) {
  if (p.channels > (1 << 30) || p.positions > (1 << 30))
    throw std::invalid_argument("group_norm_silu: more than 2^30 channels or positions");
  Cut cut = {};
  cut.channels = int(p.channels);
  cut.per_group = int(p.channels_per_group());
  cut.positions = int(p.positions);
  return cut;
}

// Tiles of whole groups at least `row_bytes` wide, or pieces of groups; without chunks.
inline Cut cut_channels(const group_norm_silu::Problem& p, int vector, int element_bytes, int64_t row_bytes) {
  const int64_t unit = unit_channels(p, vector);
  Cut cut = empty_cut(p);
  if (unit <= kThreads * int64_t(vector)) {
    const int64_t units = std::min(std::min(ceil_div(row_bytes, unit * element_bytes), kThreads * vector / unit),
                                   ceil_div(p.channels, unit));
    cut.tile_channels = int(units * unit);
    cut.tile_groups = cut.tile_channels / cut.per_group;
    cut.tiles = int(ceil_div(p.channels, cut.tile_channels));
    cut.pieces = 1;
    cut.piece_channels = cut.per_group;
  } else {
    cut.tile_channels = cut.piece_channels = kPieceVectors * vector;
    cut.tile_groups = 1;
    cut.pieces = int(ceil_div(cut.per_group, cut.piece_channels));
    cut.tiles = int(p.groups) * cut.pieces;
  }
  cut.columns = cut.tile_channels / vector;
  cut.rows = kThreads / cut.columns;
  return cut;
}

inline Cut cut_columns(const group_norm_silu::Problem& p, int vector, int element_bytes) {
  Cut cut = cut_channels(p, vector, element_bytes, kTileBytes);
  const int64_t step = cut.rows * kLoads;
  const int64_t wanted = kChunkBytes / (int64_t(cut.tile_channels) * element_bytes);
  const int64_t least = ceil_div(p.positions, std::max(1, kMaxParts / cut.pieces));
  cut.chunk_positions = int(std::max<int64_t>(1, ceil_div(std::max(wanted, least), step)) * step);
  cut.chunks = int(std::max<int64_t>(1, ceil_div(p.positions, cut.chunk_positions)));
  return cut;
}

// A team's share of a channel: vectors per lane, and at most so many chunks.
constexpr int64_t kTeamVectors = 16, kTeamChunks = 64;

inline Cut cut_rows(const group_norm_silu::Problem& p, int vector) {
  Cut cut = empty_cut(p);
  cut.columns = 1;
  while (cut.columns < kWarp && cut.columns * int64_t(vector) < p.positions) cut.columns *= 2;
  const int64_t step = cut.columns * int64_t(vector);
  const int64_t least = ceil_div(p.positions, kTeamChunks);
  cut.chunk_positions = int(ceil_div(std::max(step * kTeamVectors, least), step) * step);
  cut.chunks = int(std::max<int64_t>(1, ceil_div(p.positions, cut.chunk_positions)));
  cut.pieces = cut.per_group;
  cut.piece_channels = 1;
  cut.rows = kThreads / cut.columns;
  return cut;
}

// A cut of a sample whose tiles stay in shared memory, spread over the blocks of a cluster; chunks are these blocks.
struct Resident {
  Cut cut;
  int slots;  // vectors per thread and tensor
  int64_t data_bytes;

  explicit operator bool() const { return slots > 0; }
};

constexpr int64_t kResidentTileBytes = 64;
// A larger cluster would only add to the time of its barriers.
constexpr int64_t kResidentShareBytes = 8192;
// Two such blocks fit a multiprocessor with clusters; one without has nothing to spread a large tile over.
constexpr int64_t kResidentBytes = 98304, kResidentBytesAlone = 32768;
constexpr int kMaxCluster = 8;

// For so many tensors kept; false where they are too large, or channels no neighbours, or groups no vectors.
inline Resident cut_resident(const group_norm_silu::Problem& p, int vector, int element_bytes, int tensors,
                             int architecture) {
  const bool clusters = architecture >= 90;
  if (!p.channels_last || vector == 1 || p.positions == 0) return {};
  Resident resident = {cut_channels(p, vector, element_bytes, kResidentTileBytes), 0, 0};
  Cut& cut = resident.cut;
  if (cut.pieces > 1) return {};
  const int64_t tile_bytes = int64_t(cut.tile_channels) * element_bytes;
  cut.chunks = 1;
  while (clusters && cut.chunks < kMaxCluster && ceil_div(p.positions, cut.chunks) * tile_bytes > kResidentShareBytes)
    cut.chunks *= 2;
  cut.chunk_positions = int(ceil_div(p.positions, cut.chunks));
  cut.rows = std::min(cut.rows, cut.chunk_positions);
  const int64_t slots = ceil_div(cut.chunk_positions, cut.rows);
  resident.data_bytes = slots * cut.threads() * tensors * 16;
  if (resident.data_bytes > (clusters ? kResidentBytes : kResidentBytesAlone)) return {};
  resident.slots = int(slots);
  return resident;
}

}  // namespace rftcore::cuda
