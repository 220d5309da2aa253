// What every message says about itself, in shared memory and on the wire alike.
//
// Ranks run the same plan, so a receiver knows what must come next. The tag lets it check that: the digest
// covers topology, layout and policy, and the descriptive fields turn a disagreement into a sentence instead
// of a hang.
#pragma once

#include <cstdint>
#include <string>

namespace hybridcomm {

struct Tag {
  uint64_t digest = 0;  // of the plan
  uint64_t numel = 0;
  uint32_t step = 0;
  uint32_t nbytes = 0;     // of this message's data
  uint8_t collective = 0;  // index into the names in tag.cpp
  uint8_t dtype = 0;
  uint8_t op = 0;
  uint8_t codec = 0;
  uint32_t tensor = 0;  // which one, where the caller names it, and after which calls: a hash
};
static_assert(sizeof(Tag) == 32, "the tag is part of the wire format");

bool same_message(const Tag& seen, const Tag& expected);

// "allreduce(sum, topk) of 10 float32" of the plan a tag comes from.
std::string describe(const Tag& tag);

// The error text for two tags that should have been the same message.
std::string mismatch_text(int peer, const Tag& seen, const Tag& expected);

}  // namespace hybridcomm
