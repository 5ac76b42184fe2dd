// How a sample is cut into blocks, and its groups into parts. All of it follows from the shape of a sample: neither the
// batch nor the GPU's size changes what is added to what.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../common/group_norm_silu.h"
#include "../common/host_device.h"
#include "block.h"

namespace rftcore::cuda {

constexpr int kThreads = 256;

// Where channels are neighbours, a block takes a chunk of positions of a tile of channels: whole groups, or where one is
// too large a piece of one. Where a channel's positions are neighbours, a team of lanes takes a chunk of these, and each
// channel is a piece of its group.
struct Cut {
  int64_t chunks, chunk_positions;
  int64_t tiles, tile_channels;
  int64_t tile_groups;             // 1 where a tile is a piece of a group
  int64_t pieces, piece_channels;  // of a group
  int columns, rows;               // threads along channels, a vector each, and along positions; or lanes of a team

  RFTCORE_HOST_DEVICE int64_t parts() const { return chunks * pieces; }  // of a group

  RFTCORE_HOST_DEVICE int64_t positions_of(int64_t chunk, int64_t positions) const {
    const int64_t left = positions - chunk * chunk_positions;
    return left < chunk_positions ? (left < 0 ? 0 : left) : chunk_positions;
  }

  RFTCORE_HOST_DEVICE int64_t channels_of(int64_t piece, int64_t per_group) const {
    const int64_t left = per_group - piece * piece_channels;
    return left < piece_channels ? left : piece_channels;
  }

  // Elements of a group's part; parts are in the order (chunk, piece).
  RFTCORE_HOST_DEVICE int64_t count(int64_t part, int64_t positions, int64_t per_group) const {
    if (pieces == 1) return positions_of(part, positions) * per_group;
    return positions_of(part / pieces, positions) * channels_of(part % pieces, per_group);
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
constexpr int64_t kMaxParts = 256;
// No more vectors of a piece of a group.
constexpr int64_t kPieceVectors = 64;
// Loads that a thread has in flight.
constexpr int kLoads = 4;

// Whether tiles of vectors can be cut at all.
inline bool fits_vectors(const group_norm_silu::Problem& p, int vector) {
  if (!p.channels_last) return p.positions % vector == 0;
  if (p.channels % vector) return false;
  return unit_channels(p, vector) <= kThreads * int64_t(vector) || p.channels_per_group() % vector == 0;
}

// Tiles of whole groups at least `row_bytes` wide, or pieces of groups; without chunks.
inline Cut cut_channels(const group_norm_silu::Problem& p, int vector, int element_bytes, int64_t row_bytes) {
  const int64_t unit = unit_channels(p, vector), per_group = p.channels_per_group();
  Cut cut = {};
  if (unit <= kThreads * int64_t(vector)) {
    const int64_t units = std::min(std::min(ceil_div(row_bytes, unit * element_bytes), kThreads * vector / unit),
                                   ceil_div(p.channels, unit));
    cut.tile_channels = units * unit;
    cut.tile_groups = cut.tile_channels / per_group;
    cut.tiles = ceil_div(p.channels, cut.tile_channels);
    cut.pieces = 1;
    cut.piece_channels = per_group;
  } else {
    cut.tile_channels = cut.piece_channels = kPieceVectors * vector;
    cut.tile_groups = 1;
    cut.pieces = ceil_div(per_group, cut.piece_channels);
    cut.tiles = p.groups * cut.pieces;
  }
  cut.columns = int(cut.tile_channels / vector);
  cut.rows = kThreads / cut.columns;
  return cut;
}

inline Cut cut_columns(const group_norm_silu::Problem& p, int vector, int element_bytes) {
  Cut cut = cut_channels(p, vector, element_bytes, kTileBytes);
  const int64_t step = cut.rows * kLoads;
  const int64_t wanted = kChunkBytes / (cut.tile_channels * element_bytes);
  const int64_t least = ceil_div(p.positions, std::max<int64_t>(1, kMaxParts / cut.pieces));
  cut.chunk_positions = std::max<int64_t>(1, ceil_div(std::max(wanted, least), step)) * step;
  cut.chunks = std::max<int64_t>(1, ceil_div(p.positions, cut.chunk_positions));
  return cut;
}

// A team's share of a channel: vectors per lane, and at most so many chunks.
constexpr int64_t kTeamVectors = 16, kTeamChunks = 64;

inline Cut cut_rows(const group_norm_silu::Problem& p, int vector) {
  Cut cut = {};
  cut.columns = 1;
  while (cut.columns < kWarp && cut.columns * int64_t(vector) < p.positions) cut.columns *= 2;
  const int64_t step = cut.columns * int64_t(vector);
  const int64_t least = ceil_div(p.positions, kTeamChunks);
  cut.chunk_positions = ceil_div(std::max(step * kTeamVectors, least), step) * step;
  cut.chunks = std::max<int64_t>(1, ceil_div(p.positions, cut.chunk_positions));
  cut.pieces = p.channels_per_group();
  cut.piece_channels = 1;
  cut.rows = kThreads / cut.columns;
  return cut;
}

// A cut of a sample whose tiles stay in shared memory, spread over the blocks of a cluster; chunks are these blocks.
struct Resident {
  Cut cut;
  int64_t slots;  // vectors per thread and tensor
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
                             int compute_capability) {
  const bool clusters = compute_capability >= 90;
  if (!p.channels_last || vector == 1 || p.positions == 0) return {};
  Resident resident = {cut_channels(p, vector, element_bytes, kResidentTileBytes), 0, 0};
  Cut& cut = resident.cut;
  if (cut.pieces > 1) return {};
  const int64_t tile_bytes = cut.tile_channels * element_bytes;
  cut.chunks = 1;
  while (clusters && cut.chunks < kMaxCluster && ceil_div(p.positions, cut.chunks) * tile_bytes > kResidentShareBytes)
    cut.chunks *= 2;
  cut.chunk_positions = ceil_div(p.positions, cut.chunks);
  cut.rows = int(std::min<int64_t>(cut.rows, cut.chunk_positions));
  const int64_t slots = ceil_div(cut.chunk_positions, cut.rows);
  resident.data_bytes = slots * cut.threads() * tensors * 16;
  if (resident.data_bytes > (clusters ? kResidentBytes : kResidentBytesAlone)) return {};
  resident.slots = slots;
  return resident;
}

}  // namespace rftcore::cuda
