// One rank's part of a plan, as the executor runs it. lower.py makes it from plan.for_rank(rank).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "codec.h"
#include "custom_codec.h"
#include "reduce.h"
#include "tag.h"

namespace hybridcomm {

// The route's steps 3 to 7, each seen from one rank:
//   put      step 3, not the owner: offer a region to the owner
//   reduce   step 3, the owner: own region + those of the others -> own region
//   decode_add   step 3, the owner, compressed: own region + those of the others, which put payloads -> own region
//   encode   step 4, and before a compressed step 3: own region + residual -> payload in scratch, new residual
//   send, receive   step 5: bytes of the tensor or of scratch, to or from a rank of another node
//   sum      step 5 dense: own region + received regions -> own region
//   decode   step 6: payloads in scratch -> own region
//   publish  step 7, the owner: offer a region to the group's others
//   get      step 7, the others: copy it from there
//   share    steps 3 and 7 in one, for small regions: copy a region out for all others of the group ...
//   collect  ... and sum theirs and the own one
enum class Kind : uint8_t {
  put,
  reduce,
  encode,
  send,
  receive,
  sum,
  decode,
  publish,
  get,
  share,
  collect,
  decode_add
};
enum class Memory : uint8_t { tensor, scratch };

constexpr int64_t kOwnRegion = -1;  // among the sources of a sum: this rank's tensor

struct Op {
  Kind kind = Kind::put;
  Memory memory = Memory::tensor;  // send, receive, put
  uint32_t stream = 0;
  uint32_t step = 0;
  int peer = -1;       // local rank (put, get) or rank (send, receive)
  uint64_t begin = 0;  // region, in elements of the tensor
  uint64_t count = 0;
  uint64_t offset =
      0;  // bytes into `memory` (send, receive, put) or scratch (encode, decode_add: fetched payloads)
  uint64_t nbytes = 0;    // of the message (send, receive) or payload (encode, decode_add, put from scratch)
  uint64_t residual = 0;  // element offset of the region's residual (encode)
  uint32_t divisor = 1;
  bool deliver = false;         // reduce and the publish of its result: write it straight to those who let it
  std::vector<uint32_t> after;  // operations of this program that must have completed
  std::vector<int64_t>
      sources;            // local ranks of the group (reduce, publish, share, collect), scratch offsets
                          // (sum, decode), in group order
  uint8_t codec = 0;      // of the program's: encode, decode, decode_add
  bool momentum = false;  // encode: of the gradients themselves, so that the velocity takes their place
};

// Streams are issued in order; a stream's next operation starts when the one before it was issued and `after`
// is complete. Different streams run past each other: that is the pipeline.
struct Program {
  Tag tag;              // digest and description; step and nbytes are filled in per message
  uint64_t group = 0;   // digest of the ranks that run it; 0: all of the job
  std::string members;  // these, as text
  Dtype dtype = Dtype::float32;
  Reduction op = Reduction::sum;
  uint64_t scratch_nbytes = 0;
  std::array<kernels::CodecParams, 2> codecs{};  // between nodes, inside a node; none: not compressed
  std::shared_ptr<const CustomCodec> custom;  // set: does between nodes what the kernels do for other codecs
  std::vector<Op> ops;
  uint32_t stream_count = 0;
};

// Elements from `begin` on, up to the next piece's, lie at `data`.
struct Piece {
  uint64_t begin = 0;
  std::byte* data = nullptr;
};

// Error feedback beyond the residual itself; hybridcomm/residual.py says which law it keeps.
struct Feedback {
  float decay = 1.0f;                  // of the residual, before the gradient is added
  float momentum = 0.0f;               // of the velocity, which is compressed in the gradient's place
  bool masking = true;                 // the velocity of what was sent begins anew
  const float* velocity_in = nullptr;  // null: no momentum correction
  float* velocity_out = nullptr;       // may be velocity_in
};

struct Buffers {
  std::byte* tensor = nullptr;  // all elements of the plan, one after another; or else ...
  std::vector<Piece> pieces;    // ... several tensors, by `begin`; no operation's region reaches over an edge
  double timeout_s = 0;         // without progress; 0: the context's
  uint32_t name = 0;            // of the tensor, hashed; goes into every tag
  const float* residual_in = nullptr;  // null: memoryless
  float* residual_out = nullptr;
  Feedback feedback;
};

}  // namespace hybridcomm
