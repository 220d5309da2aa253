#include "movement.h"

#include <cstring>

#include "arithmetic.h"

namespace sim {

using namespace hybridcomm::gpu;

bool is_message(const Part& part) { return part.kind == Kind::send || part.kind == Kind::receive; }

std::pair<size_t, size_t> touched(const Part& part) {
  const size_t nbytes = part.count * size_of(part.type);
  const auto ranks = static_cast<size_t>(part.ranks);
  const bool root = part.peer == part.rank;
  switch (part.kind) {
    case Kind::all_reduce:
      return {nbytes, nbytes};
    case Kind::reduce:
      return {nbytes, root ? nbytes : 0};
    case Kind::reduce_scatter:
      return {nbytes * ranks, nbytes};
    case Kind::all_gather:
      return {nbytes, nbytes * ranks};
    case Kind::broadcast:
      return {root ? nbytes : 0, nbytes};
    case Kind::all_to_all:
      return {nbytes * ranks, nbytes * ranks};
    case Kind::send:
      return {nbytes, 0};
    case Kind::receive:
      return {0, nbytes};
  }
  return {0, 0};
}

namespace {

const char* name_of(Kind kind) {
  constexpr const char* kNames[] = {"ncclAllReduce", "ncclReduce",   "ncclReduceScatter", "ncclAllGather",
                                    "ncclBroadcast", "ncclAlltoAll", "ncclSend",          "ncclRecv"};
  return kNames[static_cast<size_t>(kind)];
}

const Part& of_rank(const Meeting& meeting, int rank) {
  for (const Meeting::Come& each : meeting.come) {
    if (each.part.rank == rank) return each.part;
  }
  return meeting.come.front().part;
}

void move_reduction(const Meeting& meeting) {
  const Part& first = meeting.come.front().part;
  const int ranks = first.ranks;
  const size_t pieces = first.kind == Kind::reduce_scatter ? static_cast<size_t>(ranks) : 1;
  const size_t nbytes = first.count * size_of(first.type);
  std::vector<const unsigned char*> inputs;
  std::vector<double> factors;
  for (int rank = 0; rank < ranks; ++rank) {
    inputs.push_back(of_rank(meeting, rank).from);
    factors.push_back(of_rank(meeting, rank).factor);
  }
  std::vector<unsigned char> result(nbytes * pieces);
  reduce(result.data(), inputs, first.count * pieces, first.type, first.op, factors);
  for (const Meeting::Come& each : meeting.come) {
    const Part& part = each.part;
    if (part.comm == nullptr || (part.kind == Kind::reduce && part.peer != part.rank)) continue;
    const size_t piece = pieces == 1 ? 0 : static_cast<size_t>(part.rank);
    std::memcpy(part.to, result.data() + piece * nbytes, nbytes);
  }
}

void move_copies(const Meeting& meeting) {
  const Part& first = meeting.come.front().part;
  const size_t nbytes = first.count * size_of(first.type);
  std::vector<unsigned char> whole;
  if (first.kind == Kind::all_gather) {
    for (int rank = 0; rank < first.ranks; ++rank) {
      const unsigned char* from = of_rank(meeting, rank).from;
      whole.insert(whole.end(), from, from + nbytes);
    }
  } else {
    const Part& root = of_rank(meeting, first.peer);
    whole.assign(root.from, root.from + nbytes);
  }
  for (const Meeting::Come& each : meeting.come) {
    if (each.part.comm != nullptr) std::memcpy(each.part.to, whole.data(), whole.size());
  }
}

void move_pieces(const Meeting& meeting) {
  const Part& first = meeting.come.front().part;
  const size_t nbytes = first.count * size_of(first.type);
  const int ranks = first.ranks;
  std::vector<std::vector<unsigned char>> whole;
  for (int rank = 0; rank < ranks; ++rank) {
    const unsigned char* from = of_rank(meeting, rank).from;
    whole.emplace_back(from, from + nbytes * static_cast<size_t>(ranks));
  }
  for (const Meeting::Come& each : meeting.come) {
    for (size_t rank = 0; each.part.comm != nullptr && rank < whole.size(); ++rank) {
      const size_t own = static_cast<size_t>(each.part.rank);
      std::memcpy(each.part.to + rank * nbytes, whole[rank].data() + own * nbytes, nbytes);
    }
  }
}

}  // namespace

void move(const Meeting& meeting) {
  const Part& first = meeting.come.front().part;
  if (is_message(first)) {
    const Part& last = meeting.come.back().part;
    const Part &from = first.kind == Kind::send ? first : last, &to = first.kind == Kind::send ? last : first;
    if (to.comm != nullptr) std::memcpy(to.to, from.from, from.count * size_of(from.type));
  } else if (first.kind == Kind::all_to_all) {
    move_pieces(meeting);
  } else if (first.kind == Kind::all_gather || first.kind == Kind::broadcast) {
    move_copies(meeting);
  } else {
    move_reduction(meeting);
  }
}

std::string text_of(const Part& part) {
  std::string text = std::string(name_of(part.kind)) + " of " + std::to_string(part.count) + " of type " +
                     std::to_string(part.type);
  if (part.peer >= 0) text += (is_message(part) ? " with " : " at ") + std::to_string(part.peer);
  return text + " by rank " + std::to_string(part.rank);
}

}  // namespace sim
